"""predict, evaluate and merge with one small bundle: exported head-only, then merged with its pretrained weights."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.cli.predict import DECISION_COLUMNS
from finetune.metrics.abstention import describe_abstention
from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import MANIFEST, check_golden, check_golden_ood_scores, open_bundle
from models.artifacts.reviews import Review, write_reviews
from models.errors import BundleError
from models.networks import registry
from models.networks.classifier import load_classifier
from models.networks.spec import WeightsSource
from models.networks.weights import read_tensors
from models.runtime.openvino_engine import OpenVINOEngine
from tests.helpers.older_bundles import without_ood_score
from tests.helpers.tiny_network import COLORS, TINY, Tiny, color_folder, finetune, paint, save_weights

pytestmark = pytest.mark.slow

CLASSES = ("blue", "red, or so")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> SimpleNamespace:
    """The data, the run with the head-only bundle, and the merged bundle."""
    root = tmp_path_factory.mktemp("made")
    data = color_folder(root / "colours", train=9, valid=5, classes=CLASSES)
    flags = (
        "--data-dir",
        data,
        "--backbone",
        "tiny",
        "--weights",
        tiny_weights,
        "--output-dir",
        root / "run",
        "--export",
        "head",
    )
    assert finetune("train", *flags)[0] == 0
    code, out, _ = finetune("merge", root / "run" / "bundle", root / "whole", "--weights", tiny_weights)
    assert code == 0
    assert f"{root / 'whole'} (version {open_bundle(root / 'whole').version})" in out
    return SimpleNamespace(data=data, run=root / "run", head=root / "run" / "bundle", whole=root / "whole")


@pytest.fixture
def whole(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the merged bundle, for tests that damage it."""
    return Path(shutil.copytree(made.whole, tmp_path / "spoilt"))


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def rejected(*words: object) -> str:
    """Run a command that must fail with a one-line error; return the error."""
    code, out, err = finetune(*words)
    assert code == 2
    assert re.fullmatch(r"finetune: [^\n]+\n", err)
    assert "bundle  " not in out
    return err


# merge


def test_a_head_and_its_base_make_the_full_network(made: SimpleNamespace, tiny_weights: Path) -> None:
    head, whole = open_bundle(made.head), open_bundle(made.whole)
    assert (head.is_head_only, whole.is_head_only) == (True, False)
    base, own = read_tensors(tiny_weights), load_file(made.whole / "model.safetensors")
    trained = load_file(made.head / "head.safetensors")
    assert trained.keys() == {"classifier.4.weight", "classifier.4.bias"}
    assert own.keys() == base.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, trained.get(name, base[name])), name
    Tiny(2).load_state_dict(own)


def test_a_bundle_with_the_graph_alone_predicts_and_can_be_merged(
    made: SimpleNamespace, tmp_path: Path, tiny_weights: Path
) -> None:
    flags = ("--backbone", "tiny", "--weights", tiny_weights, "--output-dir", tmp_path / "run", "--export", "graph")
    assert finetune("train", "--data-dir", made.data, *flags, plots=True)[0] == 0
    path = tmp_path / "run" / "bundle"
    bundle = open_bundle(path)
    assert {"model.onnx", "head.safetensors"} <= set(bundle.manifest["files"])
    assert "model.safetensors" not in bundle.manifest["files"]
    plots = {Path(name).stem for name in bundle.manifest["files"] if name.startswith("plots/")}
    assert plots == {"learning_curves", "reliability", "confusion_matrix", "ood_scores", "thresholds"}
    assert (bundle.is_head_only, bundle.lacks_weights) == (False, True)
    assert "`head.safetensors` contains only the trained tensors." in (path / "README.md").read_text(encoding="utf-8")
    code, out, err = finetune("predict", "--bundle", path, made.data / "valid", "--json")
    assert (code, len(out.splitlines())) == (0, 10)
    assert "Merging" not in err
    with pytest.raises(BundleError, match=r"has no model\.safetensors, which PyTorch needs\. Run `finetune merge "):
        load_classifier(bundle)
    assert finetune("merge", path, tmp_path / "full", "--weights", tiny_weights)[0] == 0
    assert load_file(tmp_path / "full" / "model.safetensors").keys() == load_file(made.whole / "model.safetensors").keys()
    assert (tmp_path / "full" / "model.onnx").read_bytes() == (path / "model.onnx").read_bytes()


def test_the_merged_bundle_reproduces_the_golden_outputs_of_the_head(made: SimpleNamespace) -> None:
    engine = OpenVINOEngine(made.whole / "model.onnx", outputs=["probabilities", "ood_score"])
    for bundle in (open_bundle(made.whole), open_bundle(made.head)):
        assert check_golden(bundle, lambda pixels: engine.run(pixels)[0]) < 1e-5
        scores = engine.run(bundle.golden()[0])[1]
        assert check_golden_ood_scores(bundle, scores) < 1e-4
        with pytest.raises(BundleError, match=r"does not reproduce its golden OOD scores: max relative difference 0\.1"):
            check_golden_ood_scores(bundle, scores + np.float32(0.1) * np.maximum(scores, 1))
    assert open_bundle(made.whole).manifest["merged_from"] == open_bundle(made.head).version


def test_a_different_base_is_rejected_and_nothing_is_written(made: SimpleNamespace, tmp_path: Path) -> None:
    other = save_weights(tmp_path / "other.pth", seed=1)
    message = rejected("merge", made.head, tmp_path / "out", "--weights", other)
    assert "was trained on weights with sha256" in message
    assert "file other.pth has" in message
    assert list(tmp_path.iterdir()) == [other]


def test_a_missing_base_is_reported(made: SimpleNamespace, tmp_path: Path) -> None:
    assert "No pretrained weights are known for tiny" in rejected("merge", made.head, tmp_path / "out")
    assert "There is no weights file" in rejected("merge", made.head, tmp_path / "out", "--weights", tmp_path / "no.pth")
    assert not (tmp_path / "out").exists()


def test_an_invalid_merge_is_rejected(made: SimpleNamespace, tmp_path: Path, tiny_weights: Path) -> None:
    assert "is already a full bundle" in rejected("merge", made.whole, tmp_path / "out", "--weights", tiny_weights)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in rejected("merge", made.head, tmp_path / "full", "--weights", tiny_weights)
    rejected("merge", made.head, tmp_path / "full" / "mine.txt", "--weights", tiny_weights)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


# predict


def predict(bundle: Path, *words: object, code: int = 0) -> str:
    got, out, err = finetune("predict", "--bundle", bundle, *words)
    assert (got, err) == (code, "")
    return out


def test_predictions_of_a_folder_equal_those_of_training(made: SimpleNamespace) -> None:
    expected = {row["photo"]: row for row in table(made.run / "predictions.csv")}
    rows = list(csv.DictReader(io.StringIO(predict(made.whole, made.data / "valid", "--csv"))))
    assert list(rows[0]) == ["file", "label", "confidence", "p_blue", "p_red, or so", *DECISION_COLUMNS, "error"]
    assert [row["file"] for row in rows] == [str(made.data / name) for name in expected]
    for row in rows:
        want = expected[Path(row["file"]).relative_to(made.data).as_posix()]
        assert (row["label"], row["error"]) == (want["predicted"], "")
        assert float(row["ood_score"]) == pytest.approx(float(want["ood_score"]), rel=1e-3)
        for name in ("p_blue", "p_red, or so"):
            assert float(row[name]) == pytest.approx(float(want[name]), abs=1e-5)


def test_a_damaged_photo_does_not_stop_the_others(made: SimpleNamespace, tmp_path: Path) -> None:
    good = [paint(tmp_path / f"{i}.jpg", COLORS[i], seed=700 + i) for i in range(2)]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(good[0].read_bytes()[:300])
    photos = (good[0], broken, good[1])

    lines = predict(made.whole, *photos, code=1).splitlines()
    assert re.fullmatch(rf"{re.escape(str(good[0]))}: blue \(\d+\.\d\d%\)", lines[0])
    assert lines[1].startswith(f"{broken}: The image is damaged")
    assert f"{good[1]}: red, or so (" in lines[2]

    first, second, third = map(json.loads, predict(made.whole, *photos, "--json", code=1).splitlines())
    bundle = open_bundle(made.whole)
    assert first["label"] == "blue"
    assert first["confidence"] == max(first["probabilities"].values())
    assert sum(third["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert list(third["probabilities"]) == list(CLASSES)
    assert (first["model"], first["version"]) == (bundle.name, bundle.version)
    assert second.keys() == {"file", "error"}

    rows = list(csv.DictReader(io.StringIO(predict(made.whole, *photos, "--csv", code=1))))
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert (rows[1]["p_blue"], rows[1]["confidence"]) == ("", "")
    assert float(rows[0]["confidence"]) == max(float(rows[0][name]) for name in ("p_blue", "p_red, or so"))


def test_a_prediction_does_not_depend_on_the_other_photos(made: SimpleNamespace) -> None:
    photo = sorted((made.data / "valid" / "blue").iterdir())[3]

    def ask(*photos: Path) -> Any:
        answers = map(json.loads, predict(made.whole, *photos, "--json").splitlines())
        return next(answer["probabilities"]["blue"] for answer in answers if answer["file"] == str(photo))

    assert ask(photo) == pytest.approx(ask(made.data), abs=1e-6)


def test_other_files_in_a_folder_are_ignored(made: SimpleNamespace, tmp_path: Path) -> None:
    paint(tmp_path / "deep" / "a.JPG", COLORS[0], seed=1)
    paint(tmp_path / ".ipynb_checkpoints" / "b.jpg", COLORS[0], seed=2)
    (tmp_path / "notes.txt").write_text("x")
    code, printed, notes = finetune("predict", "--bundle", made.whole, tmp_path)
    assert (code, len(printed.splitlines())) == (0, 1)
    assert notes.splitlines() == [
        f"Note: 1 skipped (hidden): {tmp_path / '.ipynb_checkpoints'}",
        f"Note: 1 skipped (not a supported image type): {tmp_path / 'notes.txt'}",
    ]


def test_a_folder_or_link_that_cannot_be_read_is_named_by_every_prediction(made: SimpleNamespace, tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "a.jpg", COLORS[0], seed=1)
    (tmp_path / "photos" / "b.jpg").symlink_to("gone.jpg")
    note = f"Note: 1 skipped (broken link): {tmp_path / 'photos' / 'b.jpg'}\n"
    for output in ((), ("--json",), ("--csv",), ("--output", tmp_path / "scores")):
        code, _, notes = finetune("predict", "--bundle", made.whole, tmp_path / "photos", *output)
        assert code == 1
        assert notes.endswith(note)


def test_the_rows_of_a_list_that_cannot_be_read_have_an_error(made: SimpleNamespace, tmp_path: Path) -> None:
    photo = paint(tmp_path / "a.jpg", COLORS[0], seed=1)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    paths = [photo, *(tmp_path / name for name in ("gone.jpg", "pipe.jpg", "loop.jpg", "x" * 300, "a.jpg/b.jpg", "."))]
    (tmp_path / "list.txt").write_bytes("\0".join(map(str, paths)).encode())
    code, _, _ = finetune("predict", "--bundle", made.whole, "--list", tmp_path / "list.txt", "--output", tmp_path / "scores")
    assert code == 0
    rows = pq.read_table(tmp_path / "scores").to_pylist()
    assert [(row["file"], row["error"]) for row in rows] == [
        (str(paths[0]), None),
        (str(paths[1]), "No such file or directory"),
        (str(paths[2]), "This is not a regular file. Use a file that contains an image."),
        (str(paths[3]), "Too many levels of symbolic links"),
        (str(paths[4]), "File name too long"),
        (str(paths[5]), "Not a directory"),
        (str(paths[6]), "Is a directory"),
    ]


def test_an_empty_folder_is_rejected(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"No photos found in {tmp_path / 'empty'}" in rejected("predict", "--bundle", made.whole, tmp_path / "empty")
    assert "No such photo or folder" in rejected("predict", "--bundle", made.whole, tmp_path / "no.jpg")


def test_a_head_only_bundle_is_merged_once_for_prediction(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path
) -> None:
    """The base is found among torchvision's downloads, and the merged bundle is cached."""
    source = WeightsSource(url="https://example.org/tiny.pth", sha256=sha256_of(tiny_weights), license="MIT")
    monkeypatch.setitem(registry._ENTRIES, "tiny", (replace(TINY, weights=source), Tiny))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(tiny_weights, tmp_path / "torch" / "hub" / "checkpoints" / "tiny.pth")
    code, first, message = finetune("predict", "--bundle", made.head, made.data / "valid")
    assert code == 0
    assert message.startswith(f"Merging {made.head} with its pretrained weights. Full bundle: ")
    shutil.rmtree(tmp_path / "torch")
    assert predict(made.head, made.data / "valid") == first == predict(made.whole, made.data / "valid")


# evaluate


def test_an_evaluation_agrees_with_training(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "results"
    flags = ("--bundle", made.whole, "--data-dir", made.data, "--output-dir", out)
    code, printed, _ = finetune("evaluate", *flags, plots=True)
    assert code == 0
    assert "accuracy" in printed
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (out, made.run))
    assert ours.keys() == theirs.keys()
    assert ours["ood"]["false_alarms"] == theirs["ood"]["false_alarms"]
    assert ours["confusion_matrix"] == theirs["confusion_matrix"]
    for measure in ("accuracy", "log_loss", "roc_auc", "calibration_error", "log_loss_uncalibrated"):
        for end in ("value", "low", "high"):
            assert ours[measure][end] == pytest.approx(theirs[measure][end], abs=1e-4), (measure, end)
    rows, expected = table(out / "predictions.csv"), table(made.run / "predictions.csv")
    assert [(r["photo"], r["label"], r["split"], r["sha256"]) for r in rows] == [
        (r["photo"], r["label"], r["split"], r["sha256"]) for r in expected
    ]
    np.testing.assert_allclose([float(r["loss"]) for r in rows], [float(r["loss"]) for r in expected], atol=1e-4)
    plots = {path.name for path in (out / "plots").iterdir()}
    assert {"confusion_matrix.png", "reliability.png"} <= plots
    assert "learning_curves.png" not in plots


def test_another_split_is_evaluated_without_its_damaged_photos(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = color_folder(tmp_path / "holiday", train=2, valid=0, classes=CLASSES)
    (data / "train").rename(data / "summer")
    (data / "summer" / "blue" / "z.jpg").write_bytes(b"no photo")
    monkeypatch.chdir(tmp_path)
    code, printed, _ = finetune("evaluate", "--bundle", made.whole, "--data-dir", data, "--split", "summer")
    assert code == 0
    assert f"Skipped: {data / 'summer' / 'blue' / 'z.jpg'}" in printed
    assert len(table(tmp_path / "evaluations" / "whole-holiday-summer" / "predictions.csv")) == 4
    again = rejected("evaluate", "--bundle", made.whole, "--data-dir", data, "--split", "summer")
    assert "is not empty" in again


def test_an_impossible_evaluation_is_rejected(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def message(data: Path, *words: object) -> str:
        return rejected("evaluate", "--bundle", made.whole, "--data-dir", data, "--output-dir", out, *words)

    other = color_folder(tmp_path / "other", train=1, valid=1, classes=("blue", "green"))
    assert "has the class 'green', but the bundle's classes are blue, red, or so" in message(other)
    assert "no folder for the split 'nights'" in message(made.data, "--split", "nights")
    assert "No such folder" in message(tmp_path / "nowhere")
    bad = color_folder(tmp_path / "bad", train=1, valid=1, classes=CLASSES)
    for photo in (bad / "valid").glob("*/*.jpg"):
        photo.write_bytes(b"no photo")
    assert "None of the 2 photos" in message(bad)
    assert not out.exists()


# None of the classes


@pytest.fixture
def black(tmp_path: Path) -> Path:
    """A photo that is unlike the training photos."""
    path = tmp_path / "black" / "night.png"
    path.parent.mkdir()
    Image.new("RGB", (56, 44)).save(path)
    return path


def test_a_photo_unlike_the_training_photos_gets_no_label(made: SimpleNamespace, black: Path) -> None:
    assert re.fullmatch(
        rf"{re.escape(str(black))}: no label, unlike the training images. Most probable: (blue|red, or so) \(\d+\.\d\d%\)\n",
        predict(made.whole, black),
    )
    row = json.loads(predict(made.whole, black, "--json"))
    assert (row["label"], row["because"], row["in_distribution"]) == (None, "unlike the training images", False)
    assert row["because_code"] == "unlike_training"
    assert row["ood_score"] > open_bundle(made.whole).decision_rule.max_ood_score
    (cells,) = csv.DictReader(io.StringIO(predict(made.whole, black, "--csv")))
    assert (cells["label"], cells["in_distribution"], cells["because"]) == ("", "false", "unlike the training images")
    assert cells["because_code"] == "unlike_training"
    assert float(cells["ood_score"]) == pytest.approx(row["ood_score"], rel=1e-6)


def test_the_most_probable_class_can_be_requested_in_any_case(made: SimpleNamespace, black: Path) -> None:
    row = json.loads(predict(made.whole, black, "--json", "--no-abstain"))
    assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert (row["because"], row["because_code"]) == ("unlike the training images", "unlike_training")
    assert row["in_distribution"] is False
    assert re.fullmatch(
        rf"{re.escape(str(black))}: (blue|red, or so) \(\d+\.\d\d%\), although unlike the training images\n",
        predict(made.whole, black, "--no-abstain"),
    )


def test_scores_in_parquet_name_the_photos_without_a_label(made: SimpleNamespace, black: Path, tmp_path: Path) -> None:
    photo = next((made.data / "valid" / "blue").iterdir())
    for out, words in ((tmp_path / "scores", ()), (tmp_path / "labels", ("--no-abstain",))):
        assert finetune("predict", "--bundle", made.whole, photo, black, "--output", out, *words)[0] == 0
    known, other = pq.read_table(tmp_path / "scores").to_pylist()
    assert (known["label"], known["in_distribution"], known["because"]) == ("blue", True, None)
    assert (other["label"], other["in_distribution"], other["because"]) == (None, False, "unlike the training images")
    assert other["ood_score"] > known["ood_score"] > 0
    labeled = pq.read_table(tmp_path / "labels").to_pylist()[1]
    assert labeled["label"] in CLASSES
    assert labeled["because_code"] == other["because_code"] == "unlike_training"
    code, _, message = finetune("predict", "--bundle", made.whole, photo, black, "--output", tmp_path / "labels")
    assert (code, "was started with abstain False, not True." in message) == (2, True)


def test_an_evaluation_measures_photos_of_none_of_the_classes(made: SimpleNamespace, black: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(made.data / "valid", data / "valid")
    (data / "valid" / "none").mkdir()
    shutil.copy(black, data / "valid" / "none" / "night.png")
    shutil.copy(made.data / "train" / "blue" / "blue.000.jpg", data / "valid" / "none" / "blue.jpg")
    words = ("evaluate", "--bundle", made.whole, "--data-dir", data, "--output-dir")
    code, printed, _ = finetune(*words, tmp_path / "out", plots=True)
    assert code == 0
    assert "none of these      50.00% (9.5 to 90.5%), 1 of 2 photos of none of the classes are caught" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["decision"]["unlike_training"] == round(10 * metrics["ood"]["false_alarms"]["value"])
    assert describe_abstention(metrics["decision"]) in printed
    measured = metrics["ood"]
    assert (measured["photos"], measured["neither_photos"], measured["caught"]["value"]) == (10, 2, 0.5)
    assert (tmp_path / "out" / "plots" / "ood_scores.png").is_file()
    code, printed, _ = finetune(*words, tmp_path / "more", "--neither", black.parent)
    assert (code, "2 of 3 photos of none of the classes are caught" in printed) == (0, True)
    folders = json.loads((tmp_path / "more" / "metrics.json").read_text())["ood"]["folders"]
    assert {name: own["neither_photos"] for name, own in folders.items()} == {"valid/none": 2, black.parent.as_posix(): 1}
    assert f"  {black.parent}: 100.00% (20.7 to 100.0%), 1 of 1 photos are caught, ROC AUC " in printed
    assert "--neither and --folds cannot be combined." in rejected(*words, tmp_path / "no", "--neither", black, "--folds", 2)


def test_reviews_of_none_of_the_classes_are_measured(made: SimpleNamespace, tmp_path: Path) -> None:
    photos = sorted((made.data / "valid" / "blue").iterdir())[:2]
    reviews = [Review(sha256_of(path), path.name, "blue", "neither", "", "", "ann", "2026-01-01T00:00:00Z") for path in photos]
    (tmp_path / "reviews.csv").write_bytes(write_reviews(reviews))
    flags = ("--bundle", made.whole, "--data-dir", made.data, "--output-dir", tmp_path / "out")
    code, printed, _ = finetune("evaluate", *flags, "--reviews", tmp_path / "reviews.csv")
    assert code == 0
    assert "0 of 2 photos of none of the classes are caught" in printed
    assert len(table(tmp_path / "out" / "predictions.csv")) == 8


def test_training_measures_the_folder_next_to_the_validation_classes(
    made: SimpleNamespace, black: Path, tmp_path: Path, tiny_weights: Path
) -> None:
    data = Path(shutil.copytree(made.data, tmp_path / "data"))
    (data / "valid" / "neither").mkdir()
    shutil.copy(black, data / "valid" / "neither")
    flags = ("--backbone", "tiny", "--weights", tiny_weights, "--output-dir", tmp_path / "run", "--false-alarms", 0.1)
    code, printed, _ = finetune("train", "--data-dir", data, *flags)
    assert code == 0
    assert "1 of 1 photos of none of the classes are caught" in printed
    assert "6.90% of new photos are expected to be false alarms, by the scores of 28 photos." in printed  # 2 of 29
    bundle = open_bundle(tmp_path / "run" / "bundle")
    assert bundle.classes == CLASSES
    assert bundle.manifest["metrics"]["ood"]["caught"]["value"] == 1
    assert bundle.manifest["ood"]["limit"]["source"] == "training and validation, out of fold"
    assert bundle.decision_rule.max_ood_score == bundle.manifest["ood"]["limit"]["max_score"]


def test_an_older_bundle_predicts_as_before(made: SimpleNamespace, black: Path, tmp_path: Path) -> None:
    older = without_ood_score(made.whole, tmp_path / "older")
    row = json.loads(predict(older, black, "--json"))
    assert row["label"] in CLASSES
    assert (row["in_distribution"], row["ood_score"], row["because"]) == (None, None, None)
    out = tmp_path / "out"
    code, printed, _ = finetune("evaluate", "--bundle", older, "--data-dir", made.data, "--output-dir", out)
    assert (code, "false alarms" in printed) == (0, False)
    assert "ood_score" not in table(out / "predictions.csv")[0]
    assert finetune("predict", "--bundle", older, black, "--output", tmp_path / "scores")[0] == 0
    (score,) = pq.read_table(tmp_path / "scores").to_pylist()
    assert (score["in_distribution"], score["ood_score"]) == (None, None)


# Changed bundles


def _swap_classes(manifest: dict[str, Any]) -> None:
    manifest["classes"].reverse()


def _newer(manifest: dict[str, Any]) -> None:
    manifest["format"] = 99


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_changed_bundle_is_rejected_by_every_command(
    made: SimpleNamespace, whole: Path, tmp_path: Path, command: str
) -> None:
    def message() -> str:
        if command == "predict":
            return rejected("predict", "--bundle", whole, made.data)
        return rejected("evaluate", "--bundle", whole, "--data-dir", made.data, "--output-dir", tmp_path / "out")

    manifest = (whole / MANIFEST).read_text(encoding="utf-8")
    for edit, words in ((_swap_classes, "was changed after it was written"), (_newer, "has format 99")):
        info = json.loads(manifest)
        edit(info)
        (whole / MANIFEST).write_text(json.dumps(info), encoding="utf-8")
        assert words in message()
    (whole / MANIFEST).write_text("{", encoding="utf-8")
    assert "cannot be read" in message()
    (whole / MANIFEST).write_text(manifest, encoding="utf-8")

    graph = bytearray((whole / "model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (whole / "model.onnx").write_bytes(graph)
    assert "model.onnx was changed or damaged" in message()
    (whole / "model.onnx").unlink()
    assert "lacks model.onnx" in message()
    shutil.rmtree(whole)
    assert "is not a bundle" in message()
    assert not (tmp_path / "out").exists()
