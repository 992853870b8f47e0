"""``finetune threshold`` writes new versions of a bundle without training, and predictions follow them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from finetune.config import from_mapping
from finetune.evaluation.held_out import read_ood_scores
from finetune.metrics.abstention import describe_abstention, measure_abstention
from finetune.metrics.ood_detection import OODLimit, fit_limit
from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import HELD_OUT, MANIFEST, Bundle, open_bundle
from models.artifacts.evaluation import EVALUATED, OUT_OF_FOLD, write_evaluation
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SimilarityIndex
from models.errors import ConfigError
from tests.helpers.older_bundles import without_ood_score, without_ood_scores
from tests.helpers.tiny_network import finetune

pytestmark = pytest.mark.slow

PHOTOS = 3000


@pytest.fixture(scope="module")
def bundle(tiny_bundle: SimpleNamespace) -> Bundle:
    return open_bundle(tiny_bundle.path)


def evaluation(
    bundle: Bundle,
    folder: Path,
    *,
    kind: str = OUT_OF_FOLD,
    split: str = "train and valid",
    seed: int = 0,
    ood_scores: bool = False,
) -> Path:
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
    scores = rng.random(PHOTOS).astype(np.float32) if ood_scores else None
    predictions = Predictions(bundle.classes, names, labels, probabilities, ("train",) * PHOTOS, sha256s, ood_scores=scores)
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
    limit = bundle.manifest["ood"]["limit"]
    expected = (
        f"A photo with an OOD score above {limit['max_score']:.4f} gets no label. {OODLimit.from_dict(limit).text()}\n"
        "No class has a threshold.\n"
    )
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
    assert lines[0].startswith("A photo with an OOD score above ")
    assert re.match(r"blue: a precision of at least 98% is guaranteed\. Measured: 100\.0%, .* and get no label\.", lines[1])
    assert lines[3:5] == ["No threshold: green.", "In total 21.3% (19.9 to 22.8%) of 3,000 photos are below a threshold."]
    code, shown, _ = finetune("threshold", changed.bundle.path)
    assert (code, shown.splitlines()) == (0, lines[:-1])
    card = (changed.bundle.path / "README.md").read_text(encoding="utf-8")
    assert "## Thresholds\n" in card
    assert f"- {lines[1]}" in card
    assert f"With the OOD score and the thresholds, {describe_abstention(measured(changed.bundle))}\n" in card
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
    assert "\nNo class has a threshold.\n" in printed
    assert cleared.decision_rule.min_probability == {}
    assert "## Thresholds" not in (cleared.path / "README.md").read_text(encoding="utf-8")
    code, _, err = finetune("threshold", cleared.path, "--target-precision", "0.98", "--output-dir", tmp_path / "again")
    assert (code, err) == (0, "")
    again = open_bundle(tmp_path / "again").decision_rule.min_probability
    assert {name: again[name] for name in ("blue", "red")} == changed.bundle.decision_rule.min_probability


def test_other_classes_keep_their_target(changed: SimpleNamespace, tmp_path: Path) -> None:
    before = changed.bundle.decision_rule.min_probability
    code, printed, err = finetune(
        "threshold", changed.bundle.path, "--target-precision", "blue=0.9,green=0.98", "--output-dir", tmp_path / "more"
    )
    assert (code, err) == (0, "")
    more = open_bundle(tmp_path / "more")
    targets = {name: point["target"] for name, point in more.manifest["operating_points"]["classes"].items()}
    assert targets == {"blue": 0.9, "green": 0.98, "red": 0.98}
    assert more.decision_rule.min_probability["red"] == before["red"]
    assert [line.partition(":")[0] for line in printed.splitlines()[1:4]] == ["blue", "green", "red"]
    code, printed, err = finetune(
        "threshold", more.path, "--target-precision", "red=none", "--evaluation", changed.evaluation, "--output-dir",
        tmp_path / "less",
    )  # fmt: skip
    assert (code, err) == (0, ""), "an evaluation of the first version is one of all later versions"
    assert "\nNo threshold: red.\n" in printed
    less = open_bundle(tmp_path / "less")
    assert "red" not in less.decision_rule.min_probability
    assert less.manifest["thresholds_from"] == changed.bundle.manifest["thresholds_from"]


def measured(bundle: Bundle) -> dict[str, Any]:
    """What the rule does to the evaluated photos, by the manifest."""
    decision: dict[str, Any] = bundle.manifest["metrics"]["decision"]
    return decision


def test_the_rule_is_measured_on_the_evaluated_photos(bundle: Bundle, changed: SimpleNamespace) -> None:
    predictions = Predictions.read_csv(bundle.path / "predictions.csv")
    assert measured(bundle) == measure_abstention(predictions, bundle.decision_rule)
    assert measured(changed.bundle) == measure_abstention(predictions, changed.bundle.decision_rule)
    assert measured(changed.bundle)["low_probability"] > measured(bundle)["low_probability"] == 0


# The limit of the OOD score


def test_another_rate_of_false_alarms_changes_the_limit(changed: SimpleNamespace, tmp_path: Path) -> None:
    bundle = changed.bundle
    scores = read_ood_scores(bundle).in_distribution
    assert fit_limit(scores, 0.01).max_score == bundle.decision_rule.max_ood_score
    code, printed, err = finetune("threshold", bundle.path, "--false-alarms", 0.2, "--output-dir", tmp_path / "new")
    assert (code, err) == (0, "")
    new = open_bundle(tmp_path / "new")
    old_limit, limit = (version.manifest["ood"]["limit"] for version in (bundle, new))
    assert limit == {**fit_limit(scores, 0.2, sample=18).as_dict(), "source": old_limit["source"]}
    assert new.decision_rule == replace(bundle.decision_rule, max_ood_score=limit["max_score"])
    assert limit["max_score"] < old_limit["max_score"]
    assert printed.startswith(f"A photo with an OOD score above {limit['max_score']:.4f} gets no label. 20.00% of new photos")
    assert new.manifest["metrics"]["ood"]["max_score"] == limit["max_score"]
    assert measured(new)["unlike_training"] >= measured(bundle)["unlike_training"]
    assert f"is then above {limit['max_score']:.4g}." in (new.path / "README.md").read_text(encoding="utf-8")
    assert new.manifest["files"]["model.onnx"] == bundle.manifest["files"]["model.onnx"]


def test_an_older_bundle_takes_the_scores_of_an_evaluation(bundle: Bundle, tmp_path: Path) -> None:
    older = without_ood_scores(bundle.path, tmp_path / "older")
    expected = (
        f"The bundle {older} has no OOD scores of photos that were not used in training. Run `finetune evaluate "
        f"{older} --folds 5 --data-dir DATA`, and pass its output folder with --evaluation."
    )
    assert rejected(older, "--false-alarms", 0.1) == expected
    folder = evaluation(open_bundle(older), tmp_path / "folds", ood_scores=True)
    code, printed, err = finetune(
        "threshold", older, "--false-alarms", 0.1, "--evaluation", folder, "--output-dir", tmp_path / "new"
    )
    assert (code, err) == (0, "")
    assert "by the scores of 3,000 photos." in printed
    assert open_bundle(tmp_path / "new").decision_rule.max_ood_score == pytest.approx(0.9, abs=0.02)
    message = rejected(older, "--false-alarms", 0.1, "--evaluation", evaluation(open_bundle(older), tmp_path / "without"))
    assert message == "The evaluation has no OOD scores. Run `finetune evaluate` again."


def test_a_rate_out_of_range_and_a_bundle_without_a_score_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    assert rejected(bundle.path, "--false-alarms", 2) == "--false-alarms must be between 0.0001 and 0.5 (got 2.0)."
    older = without_ood_score(bundle.path, tmp_path / "older")
    expected = f"The bundle {older} has no OOD score. Train it again to get one."
    assert rejected(older, "--false-alarms", 0.1) == expected
    code, printed, _ = finetune("threshold", older)
    assert (code, printed.splitlines()[0]) == (
        0, "The bundle has no limit of the OOD score, so photos that are unlike the training photos get a label as well."
    )  # fmt: skip


# Errors


def test_a_bundle_without_out_of_fold_predictions_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    expected = (
        f"The bundle {bundle.path} has no out-of-fold predictions. Run `finetune evaluate {bundle.path} --folds 5 "
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
    assert message == "--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got '95')."


def test_options_that_change_nothing_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    expected = "--evaluation and --output-dir require --target-precision, --false-alarms or --clear. Add one, or remove them."
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
