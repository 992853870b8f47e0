"""``finetune threshold`` writes new versions of a bundle without training, and predictions follow them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from finetune.config import from_mapping
from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import HELD_OUT, MANIFEST, Bundle, open_bundle
from models.artifacts.evaluation import EVALUATED, OUT_OF_FOLD, write_evaluation
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SimilarityIndex
from models.errors import ConfigError
from tests.helpers.tiny_network import finetune

pytestmark = pytest.mark.slow

PHOTOS = 3000


@pytest.fixture(scope="module")
def bundle(tiny_bundle: SimpleNamespace) -> Bundle:
    return open_bundle(tiny_bundle.path)


def evaluation(bundle: Bundle, folder: Path, *, kind: str = OUT_OF_FOLD, split: str = "train and valid", seed: int = 0) -> Path:
    """Write an evaluation of generated predictions. Below a probability of 0.999 three in ten are wrong, above none is."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    count = len(bundle.classes)
    confidences = np.where(np.arange(PHOTOS) % 5 == 0, rng.uniform(0.5, 0.999, PHOTOS), rng.uniform(0.9991, 0.9999, PHOTOS))
    predicted = np.arange(PHOTOS) % count
    labels = np.where((confidences < 0.999) & (rng.random(PHOTOS) < 0.3), (predicted + 1) % count, predicted)
    probabilities = np.repeat(((1 - confidences) / (count - 1))[:, None], count, axis=1)
    probabilities[np.arange(PHOTOS), predicted] = confidences
    names = tuple(f"train/{number:04d}.jpg" for number in range(PHOTOS))
    sha256s = tuple(rng.bytes(32).hex() for _ in names)
    predictions = Predictions(bundle.classes, names, labels, probabilities, ("train",) * PHOTOS, sha256s)
    predictions.write_csv(folder / "predictions.csv")
    SimilarityIndex(sha256s, rng.normal(size=(PHOTOS, 4)).astype(np.float16), ()).write(folder)
    folds = 5 if kind == OUT_OF_FOLD else None
    write_evaluation(folder, bundle, kind=kind, classes=bundle.classes, split=split, temperature=1.0, folds=folds)
    return folder


@pytest.fixture(scope="module")
def changed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The bundle with thresholds for a precision of 98% of two of its three classes, and what the command printed."""
    folder = tmp_path_factory.mktemp("threshold")
    before = {name: sha256_of(bundle.path / name) for name in (MANIFEST, *bundle.manifest["files"])}
    results = evaluation(bundle, folder / "folds")
    code, printed, err = finetune(
        "threshold", bundle.path, "--target-precision", "blue=0.98,red=0.98", "--evaluation", results,
        "--output-dir", folder / "new",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert {name: sha256_of(bundle.path / name) for name in before} == before
    return SimpleNamespace(bundle=open_bundle(folder / "new"), printed=printed, evaluation=results)


def rejected(*words: object) -> str:
    code, out, err = finetune("threshold", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"finetune: [^\n]+\n", err)
    return err.removeprefix("finetune: ").rstrip("\n")


def test_a_bundle_without_thresholds_says_so(bundle: Bundle) -> None:
    expected = f"{bundle.path} has no thresholds. Every photo gets its most probable class.\n"
    assert finetune("threshold", bundle.path) == (0, expected, "")


def test_the_new_version_has_the_thresholds_and_the_same_network(bundle: Bundle, changed: SimpleNamespace) -> None:
    new = changed.bundle
    assert new.version != bundle.version
    assert (new.name, new.manifest["thresholds_from"]) == (bundle.name, bundle.version)
    files = {name: entry for name, entry in new.manifest["files"].items() if name not in (HELD_OUT, "README.md")}
    assert files == {name: entry for name, entry in bundle.manifest["files"].items() if name != "README.md"}
    required = new.decision_rule.min_probability
    assert set(required) == {"blue", "red"}
    assert all(0.999 < probability < 0.9999 for probability in required.values())
    assert new.decision_rule.max_ood_score == bundle.decision_rule.max_ood_score


def test_the_thresholds_are_printed_and_in_the_model_card(changed: SimpleNamespace) -> None:
    lines = changed.printed.splitlines()
    assert lines[-1] == f"bundle       {changed.bundle.path} (version {changed.bundle.version})"
    assert re.match(r"blue: precision of at least 98%, measured 100\.0% .* and get no label\.", lines[0])
    assert re.fullmatch(r"In total 21\.3% \(19\.9 to 22\.8%\) of 3,000 photos get no label\.", lines[2])
    code, shown, _ = finetune("threshold", changed.bundle.path)
    assert (code, shown.splitlines()) == (0, lines[:-1])
    card = (changed.bundle.path / "README.md").read_text(encoding="utf-8")
    assert "## Thresholds\n" in card
    assert f"- {lines[0]}" in card
    assert "selected from 3,000 out-of-fold predictions" in card


def test_thresholds_are_changed_and_cleared_without_the_evaluation(changed: SimpleNamespace, tmp_path: Path) -> None:
    code, printed, err = finetune(
        "threshold", changed.bundle.path, "--target-precision", "0.9", "--output-dir", tmp_path / "lower"
    )
    assert (code, err) == (0, "")
    lower = open_bundle(tmp_path / "lower")
    assert set(lower.manifest["operating_points"]["classes"]) == set(lower.classes)
    assert all(lower.decision_rule.min_probability.get(name, 0.0) < 0.99 for name in lower.classes)
    code, printed, err = finetune("threshold", lower.path, "--clear")
    assert (code, err) == (0, "")
    cleared = open_bundle(tmp_path / "lower-thresholds")
    assert printed.startswith(f"{cleared.path} has no thresholds.")
    assert cleared.decision_rule.min_probability == {}
    assert "## Thresholds" not in (cleared.path / "README.md").read_text(encoding="utf-8")
    code, _, err = finetune("threshold", cleared.path, "--target-precision", "0.98", "--output-dir", tmp_path / "again")
    assert (code, err) == (0, "")
    again = open_bundle(tmp_path / "again").decision_rule.min_probability
    assert {name: again[name] for name in ("blue", "red")} == changed.bundle.decision_rule.min_probability


def test_a_bundle_without_out_of_fold_predictions_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    expected = (
        f"The bundle {bundle.path} has no out-of-fold predictions. Run `finetune evaluate --folds 5 --bundle {bundle.path} "
        "--data-dir DATA`, and pass its output folder with --evaluation."
    )
    assert rejected(bundle.path, "--target-precision", "0.99", "--output-dir", tmp_path / "new") == expected
    assert not (tmp_path / "new").exists()


def test_unknown_classes_and_invalid_targets_are_refused(bundle: Bundle) -> None:
    message = rejected(bundle.path, "--target-precision", "rod=0.9")
    assert (
        message == "--target-precision names 'rod', which is not a class. Did you mean 'red'? The classes are blue, green, red."
    )
    message = rejected(bundle.path, "--target-precision", "95")
    assert message == "--target-precision must be between 0 and 1, such as 0.99 (got '95')."


def test_options_that_change_nothing_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    expected = "--evaluation and --output-dir require --target-precision or --clear. Add one, or remove them."
    assert rejected(bundle.path, "--output-dir", tmp_path / "new") == expected


def test_a_folder_with_files_is_not_overwritten(changed: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    message = rejected(changed.bundle.path, "--clear", "--output-dir", tmp_path)
    assert message == f"The folder {tmp_path} is not empty. Choose another folder, or delete it first."


def test_evaluations_of_other_bundles_and_of_training_photos_are_refused(
    bundle: Bundle, changed: SimpleNamespace, tmp_path: Path
) -> None:
    other = Bundle(bundle.path, {**bundle.manifest, "sha256": "0" * 64})
    folder = evaluation(other, tmp_path / "other")
    message = rejected(bundle.path, "--target-precision", "0.9", "--evaluation", folder)
    assert message == f"{folder} is not an evaluation of the bundle {bundle.path} (version {bundle.version}). Evaluate it."
    folder = evaluation(bundle, tmp_path / "train", kind=EVALUATED, split="train")
    message = rejected(bundle.path, "--target-precision", "0.9", "--evaluation", folder)
    assert message == f"{folder} has predictions of training photos, which look better than others. Evaluate other photos."
    message = rejected(bundle.path, "--target-precision", "0.9", "--evaluation", bundle.path)
    assert message == f"{bundle.path} is not an evaluation of the bundle {bundle.path} (version {bundle.version}). Evaluate it."


# Training


def test_training_selects_thresholds_from_out_of_fold_predictions(
    tiny_bundle: SimpleNamespace, tiny_weights: Path, tmp_path: Path
) -> None:
    """54 photos: 12 of each class for training and 6 for validation, all predicted out of fold."""
    out = tmp_path / "run"
    code, printed, err = finetune(
        "train", "--data-dir", tiny_bundle.data, "--backbone", "tiny", "--weights", tiny_weights, "--export", "head",
        "--target-precision", "red=0.5,blue=0.99", "--output-dir", out,
    )  # fmt: skip
    assert (code, err) == (0, "")
    trained = open_bundle(out / "bundle")
    points = trained.manifest["operating_points"]
    assert (points["source"], points["folds"], points["photos"]) == ("out-of-fold", 5, 54)
    assert set(points["classes"]) == {"blue", "red"}
    assert HELD_OUT in trained.manifest["files"]
    assert "\nThresholds:\nred: " in printed
    required = {name: point["min_probability"] for name, point in points["classes"].items() if point["min_probability"]}
    assert trained.decision_rule.min_probability == required
    assert yaml.safe_load((out / "config.yaml").read_text())["target_precision"] == "red=0.5,blue=0.99"
    code, _, err = finetune("threshold", trained.path, "--target-precision", "0.6", "--output-dir", tmp_path / "other")
    assert (code, err) == (0, "")
    assert set(open_bundle(tmp_path / "other").manifest["operating_points"]["classes"]) == set(trained.classes)


def test_an_unknown_class_stops_training_before_it_starts(
    tiny_bundle: SimpleNamespace, tiny_weights: Path, tmp_path: Path
) -> None:
    code, _, err = finetune(
        "train", "--data-dir", tiny_bundle.data, "--backbone", "tiny", "--weights", tiny_weights,
        "--target-precision", "reds=0.9", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    expected = "--target-precision names 'reds', which is not a class. Did you mean 'red'? The classes are blue, green, red."
    assert (code, err) == (2, f"finetune: {expected}\n")
    assert not (tmp_path / "run").exists()


def test_the_setting_may_be_a_number_in_a_file(tmp_path: Path) -> None:
    assert from_mapping({"target_precision": 0.99}).target_precision == "0.99"
    with pytest.raises(ConfigError, match="target_precision must be a string"):
        from_mapping({"target_precision": True})
