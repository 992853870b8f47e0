"""The shipped bundle: its size and contents, its model card, and its predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.__main__ import main
from models.artifacts.bundle import GRAPH, check_golden, check_golden_ood_scores, open_bundle
from models.runtime.openvino_engine import OpenVINOEngine
from service.explain.cam import LinearHead
from service.explain.explainer import OUTPUTS

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "shipped" / "dogs-vs-cats"


def test_bundle_is_small_and_contains_no_photos() -> None:
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 19_000_000
    assert not open_bundle(SHIPPED).is_head_only
    names = {file.relative_to(SHIPPED).as_posix() for file in files}
    assert names == set(open_bundle(SHIPPED).manifest["files"]) | {"manifest.json"}
    plots = ("more_photos", "reliability", "confusion_matrix", "ood_scores", "thresholds")
    assert {name for name in names if name.endswith((".png", ".jpg"))} == {f"plots/{name}.png" for name in plots}


def test_model_card_states_the_manifests_accuracy() -> None:
    value = open_bundle(SHIPPED).manifest["metrics"]["accuracy"]["value"]
    assert f"| accuracy | {value:.4f} |" in (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert value >= 0.985


def test_photos_of_other_things_were_measured() -> None:
    """The card states how well they are recognized."""
    bundle = open_bundle(SHIPPED)
    measured = bundle.manifest["metrics"]["ood"]
    assert measured["caught"]["value"] >= 0.98
    assert measured["auroc"]["value"] >= 0.997
    limit = bundle.manifest["ood"]["limit"]
    assert limit["sample_low"] <= measured["false_alarms"]["value"] <= limit["sample_high"]
    assert bundle.decision_rule.max_ood_score == limit["max_score"] == measured["max_score"]
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert f"photos of none of the classes | {measured['caught']['value']:.4f} |" in card


def test_bundle_reproduces_its_golden_outputs_and_predicts(
    photo_folder: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(SHIPPED)
    engine = OpenVINOEngine(bundle.path / GRAPH, outputs=bundle.engine_outputs)
    assert check_golden(bundle, lambda pixels: engine.run(pixels)[0]) <= 1e-3
    assert check_golden_ood_scores(bundle, engine.run(bundle.golden()[0])[1]) <= 1e-3
    photos = photo_folder(tmp_path / "drawn", train=1, valid=0)  # type: ignore[operator]
    assert main(["predict", "--bundle", str(SHIPPED), str(photos), "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(result["probabilities"]) for result in results] == [{"cats", "dogs"}] * 2


def test_score_maps_are_exact(photo_folder: object, tmp_path: Path) -> None:
    """Lite0's head is linear in its averaged last feature map, so the means of the score maps give the probabilities."""
    bundle = open_bundle(SHIPPED)
    photo = next(photo_folder(tmp_path / "drawn", train=1, valid=0).rglob("*.jpg"))  # type: ignore[attr-defined,operator]
    pixels = bundle.preprocessing.pixels(photo.read_bytes())
    engine = OpenVINOEngine(bundle.path / GRAPH, outputs=OUTPUTS, threads=1, batch_sizes=(1,))
    probabilities, embedding, feature_map = (rows[0] for rows in engine.run(pixels[None]))
    head = LinearHead.from_bundle(bundle)
    assert head is not None
    maps = [head.score_map(probabilities, embedding, feature_map, label) for label in range(2)]
    scores = (np.array([score_map.mean() for score_map in maps if score_map is not None]) + head.bias) / head.temperature
    assert np.exp(scores) / np.exp(scores).sum() == pytest.approx(probabilities, abs=1e-5)
