"""``finetune tune``, training with a preset, and the bundle of a join."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from finetune.config import Config
from finetune.presets import apply_preset
from finetune.tuning.networks import select_backbones
from finetune.tuning.search import search
from finetune.tuning.tuning_report import choose_presets
from models.artifacts.bundle import check_golden, open_bundle
from models.artifacts.predictions import Predictions
from models.errors import ConfigError, DataError
from models.networks.classifier import load_classifier
from models.networks.join import Join
from models.runtime.openvino_engine import OpenVINOEngine
from tests.helpers.tiny_network import color_folder, finetune, registered_with_local_weights

pytestmark = pytest.mark.slow

NETWORKS = ("tiny", "tiny+flip", "tiny+tiny_large")


@pytest.fixture(scope="module", autouse=True)
def _networks() -> Iterator[None]:
    with registered_with_local_weights():
        yield


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("tune")
    data = color_folder(root / "colours", train=15, valid=5, classes=("blue", "red", "violet"))
    code, printed, err = finetune("tune", data, "--backbones", ",".join(NETWORKS), "--output-dir", root / "tune")
    assert (code, err) == (0, "")
    return SimpleNamespace(
        root=root, data=data, printed=printed, result=json.loads((root / "tune" / "tune.json").read_text(encoding="utf-8"))
    )


def test_every_candidate_is_compared_with_the_best(tuned: SimpleNamespace) -> None:
    rows = tuned.result["candidates"]
    assert len(rows) == 3 * len(NETWORKS)
    assert {(row["backbone"], row["normalization"]) for row in rows} == {
        (name, normalization) for name in NETWORKS for normalization in ("unit", "standard", "none")
    }
    losses = [row["log_loss"]["value"] for row in rows]
    assert losses == sorted(losses)
    assert rows[0]["p"] is None
    assert all(0 < row["p"] <= 1 for row in rows[1:])
    for row in rows:
        for figure in ("accuracy", "log_loss", "log_loss_above_best"):
            assert row[figure]["low"] <= row[figure]["value"] <= row[figure]["high"]
        assert row["ms_per_image"] > 0
        assert row["graph_mb"] > 0
    assert tuned.result["photos"] == 45  # without the validation photos
    with (tuned.root / "tune" / "tune.csv").open(encoding="utf-8", newline="") as file:
        assert [float(row["log_loss_value"]) for row in csv.DictReader(file)] == losses


def test_the_report_has_a_row_for_each_network(tuned: SimpleNamespace) -> None:
    text = (tuned.root / "tune" / "tune.md").read_text(encoding="utf-8")
    assert text in tuned.printed
    assert f"Next: finetune train {tuned.data} --preset best --tuning {tuned.root / 'tune' / 'tune.json'}" in tuned.printed
    for name in NETWORKS:
        assert text.count(f"| {name} | ") == 1
    assert f"# Heads for colours: {3 * len(NETWORKS)} candidates on 45 training photos" in text


@pytest.fixture(scope="module")
def joined(tuned: SimpleNamespace) -> SimpleNamespace:
    """The run of a preset that names the join, as a bundle of its graphs, with int8."""
    chosen = {**tuned.result, "presets": {"best": {**tuned.result["presets"]["best"], "backbone": NETWORKS[2]}}}
    file = tuned.root / "join.json"
    file.write_text(json.dumps(chosen), encoding="utf-8")
    folder = tuned.root / "run"
    flags = ("--preset", "best", "--tuning", file, "--output-dir", folder, "--export", "graph", "--max-accuracy-loss", 0.2)
    code, printed, err = finetune("train", "--data-dir", tuned.data, *flags)
    assert (code, err) == (0, "")
    assert finetune("merge", folder / "bundle", tuned.root / "merged")[0] == 0
    return SimpleNamespace(folder=folder, printed=printed, data=tuned.data, merged=tuned.root / "merged", settings=chosen)


def test_a_preset_trains_what_was_chosen(joined: SimpleNamespace) -> None:
    saved = yaml.safe_load((joined.folder / "config.yaml").read_text())
    chosen = joined.settings["presets"]["best"]
    assert {name: saved[name] for name in chosen} == chosen
    assert saved["preset"] is saved["tuning"] is None  # a resumed run does not depend on the file
    assert saved["refit"]
    assert open_bundle(joined.folder / "bundle").manifest["provenance"]["penalty"] == chosen["penalty"]
    assert finetune("train", "--resume", "--output-dir", joined.folder)[0] == 0


def test_the_bundle_of_a_join_is_one_network(joined: SimpleNamespace, tmp_path: Path) -> None:
    """Merging has checked the golden outputs of the graph, and the export its parity with training."""
    head, merged = open_bundle(joined.folder / "bundle"), open_bundle(joined.merged)
    assert merged.preprocessing.input_px == 40
    assert merged.has_ood_score
    assert set(head.manifest["files"]) >= {"head.safetensors", "golden.npz", "ood.npz"}
    assert isinstance(load_classifier(merged).net, Join)
    assert "Tiny + Tiny" in (joined.folder / "bundle" / "README.md").read_text(encoding="utf-8")
    flags = ("--bundle", joined.merged, "--data-dir", joined.data, "--output-dir")
    code, _, err = finetune("evaluate", *flags, tmp_path / "valid")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "valid" / "metrics.json").read_text())["photos"] == 15
    code, _, err = finetune("evaluate", "--folds", 5, *flags, tmp_path / "folds")
    assert (code, err) == (0, "")
    measured = json.loads((tmp_path / "folds" / "metrics.json").read_text())
    assert measured["photos"] == 60
    assert measured["log_loss"]["value"] == pytest.approx(merged.manifest["metrics"]["log_loss"]["value"], abs=1e-6)


def test_int8_of_a_join_is_tested_by_heads_that_were_fitted_without_the_photos(joined: SimpleNamespace) -> None:
    """Of 60 photos, the 45 of training were quantized with."""
    bundle = open_bundle(joined.folder / "bundle")
    measured = bundle.manifest["int8"]
    assert (measured["file"], measured["images"], measured["calibration_images"]) == ("model.int8.onnx", 15, 45)
    rows = Predictions.read_csv(joined.folder / "predictions.csv")
    assert measured["log_loss"]["fp32"] == pytest.approx(rows.losses[45:].mean(), rel=1e-6)
    assert measured["changed_labels"] == 0
    engine = OpenVINOEngine(bundle.graph("int8"), outputs=["probabilities"], precision="int8")
    assert check_golden(bundle, lambda pixels: engine.run(pixels)[0], golden=bundle.golden("int8")) <= 1e-3


def test_a_preset_needs_a_result_of_tune(tmp_path: Path) -> None:
    data = tmp_path / "pets"
    with pytest.raises(ConfigError) as caught:
        apply_preset(Config(data_dir=data, preset="best"))
    assert str(caught.value) == (
        f"--preset needs runs/pets-tune/tune.json. Run `finetune tune {data}` first, or pass --tuning FILE."
    )
    file = tmp_path / "other.json"
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other\.json is not a result of `finetune tune` \(TypeError\)\. Run it again\."):
        apply_preset(Config(data_dir=data, preset="best", tuning=file))
    code, _, err = finetune("train", "--data-dir", data, "--preset", "best", "--backbone", "tiny")
    assert code == 2
    assert "--preset and --backbone cannot be combined, as the preset chooses both. Remove one of the two." in err


def test_the_default_networks_are_those_with_local_weights() -> None:
    names = select_backbones(None)
    assert {"tiny", "tiny+flip", "tiny_large", "efficientnet_lite0", "efficientnet_lite0+efficientnet_lite1"} <= set(names)
    assert not {"vgg16", "lenet5"} & set(names)
    assert len(names) == len(set(names))


# The search


def noise(count: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def test_the_estimate_is_honest_where_the_best_candidate_looks_too_good() -> None:
    """Among 12 networks whose embeddings are noise, one looks better than chance, and the cross-validated choice does not."""
    labels = np.arange(60) % 2
    embeddings = {f"noise {seed}": noise(60, seed=seed) for seed in range(12)}
    found = search(embeddings, labels, np.arange(60), num_classes=2, normalizations=["unit"], seed=0, workers=2)
    best = found.results[0].losses(labels).mean()
    chosen = -found.selected_log_probs[np.arange(60), labels].mean()
    assert chosen > best
    assert chosen >= np.log(2) - 0.02


def test_a_network_that_knows_the_classes_is_found() -> None:
    labels = np.arange(60) % 2
    embeddings = {f"noise {seed}": noise(60, seed=seed) for seed in range(3)}
    embeddings["informative"] = noise(60, seed=9)
    embeddings["informative"][:, 0] += 6 * labels
    found = search(embeddings, labels, np.arange(60), num_classes=2, normalizations=["none"], seed=0, workers=1)
    assert found.results[0].candidate.backbone == "informative"
    np.testing.assert_array_equal(found.selected_log_probs, found.results[0].log_probs)


def test_too_few_photos_are_rejected() -> None:
    with pytest.raises(DataError, match="There are too few photos to compare heads"):
        search(
            {"a": noise(2, seed=0)}, np.array([0, 1]), np.arange(2), num_classes=2, normalizations=["unit"], seed=0, workers=1
        )


def row(backbone: str, loss: float, ms: float) -> dict[str, object]:
    settings = {"backbone": backbone, "head": "logistic", "normalization": "unit", "penalty": 0.01}
    return settings | {"log_loss": {"value": loss}, "ms_per_image": ms}


def test_presets_are_the_best_the_fastest_and_one_between() -> None:
    rows = [row("large", 0.018, 30.0), row("medium", 0.020, 15.0), row("middling", 0.024, 12.0), row("small", 0.026, 8.0)]
    chosen = choose_presets([*rows, row("small", 0.030, 8.0)])
    assert {name: preset["backbone"] for name, preset in chosen.items()} == {
        "best": "large",
        "balanced": "medium",
        "fast": "small",
    }
    assert {preset["backbone"] for preset in choose_presets(rows[3:]).values()} == {"small"}
