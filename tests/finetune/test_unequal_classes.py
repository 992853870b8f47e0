"""Training on unequal classes, from the audit to the bundle."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from finetune.metrics.head_comparison import compare_heads, format_head_comparison
from finetune.reports.model_card import write_model_card
from models.artifacts.bundle import open_bundle
from models.artifacts.statistics import mcnemar_p_value, wilson_interval
from tests.helpers.tiny_network import color_folder, finetune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 blue, 4 red and 20 green photos for training."""
    root = color_folder(tmp_path_factory.mktemp("unequal") / "colours", train=20, valid=5, classes=("blue", "green", "red"))
    for photo in sorted((root / "train" / "red").iterdir())[4:]:
        photo.unlink()
    return root


def train(data: Path, weights: Path, out: Path, *more: object) -> SimpleNamespace:
    flags = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", out, "--epochs", 6)
    code, printed, err = finetune("train", *flags, *more)
    assert (code, err) == (0, "")
    return SimpleNamespace(folder=out, printed=printed, bundle=open_bundle(out / "bundle"), data=data)


@pytest.fixture(scope="module")
def balanced(data: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    file = tmp_path_factory.mktemp("weights") / "weights.csv"
    file.write_text("blue,1\ngreen,1\nred,5\n", encoding="utf-8")
    return train(data, tiny_weights, tmp_path_factory.mktemp("balanced") / "run", "--class-weights", file)


@pytest.fixture(scope="module")
def plain(data: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return train(data, tiny_weights, tmp_path_factory.mktemp("plain") / "run")


def test_the_run_saves_the_weights_and_not_the_name_of_their_file(balanced: SimpleNamespace) -> None:
    weights = '{"blue": 1.0, "green": 1.0, "red": 5.0}'
    assert yaml.safe_load((balanced.folder / "config.yaml").read_text())["class_weights"] == weights
    assert balanced.bundle.manifest["provenance"]["config"]["class_weights"] == weights
    effective = balanced.bundle.manifest["class_balance"]["weights"]
    assert effective["red"] == pytest.approx(5 * effective["blue"])
    assert 20 * effective["blue"] + 20 * effective["green"] + 4 * effective["red"] == pytest.approx(44)
    assert 0 <= balanced.bundle.manifest["class_balance"]["correction"] <= 1


def test_a_run_is_resumed_with_its_weights_only(balanced: SimpleNamespace) -> None:
    assert finetune("train", "--resume", "--output-dir", balanced.folder)[0] == 0
    code, _, err = finetune("train", "--resume", "--output-dir", balanced.folder, "--class-weights", "balanced")
    assert code == 2
    assert 'was started with --class-weights {"blue": 1.0' in err


def test_the_exported_graph_has_the_correction(balanced: SimpleNamespace, tmp_path: Path) -> None:
    """The export compares the graph with training, and an evaluation by the graph repeats the metrics of training."""
    code, _, err = finetune(
        "evaluate", "--bundle", balanced.bundle.path, "--data-dir", balanced.data, "--output-dir", tmp_path / "evaluation"
    )
    assert (code, err) == (0, "")
    repeated = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    trained = json.loads((balanced.folder / "metrics.json").read_text())
    for name in ("log_loss", "log_loss_uncalibrated", "roc_auc"):
        assert repeated[name]["value"] == pytest.approx(trained[name]["value"], abs=1e-4)
    assert repeated["balanced_accuracy"] == trained["balanced_accuracy"]


def test_cross_validation_weights_and_corrects_its_heads(balanced: SimpleNamespace, tiny_weights: Path, tmp_path: Path) -> None:
    """Out of fold, the mean probability of a class is about its frequency; without the correction, red would have a third."""
    out = tmp_path / "folds"
    flags = ("--bundle", balanced.bundle.path, "--data-dir", balanced.data, "--weights", tiny_weights, "--output-dir", out)
    code, _, err = finetune("evaluate", "--folds", 3, *flags)
    assert (code, err) == (0, "")
    with (out / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    assert len(rows) == 44
    assert np.mean([float(row["p_red"]) for row in rows]) == pytest.approx(4 / 44, abs=0.09)


@pytest.mark.parametrize("run", ["plain", "balanced"])
def test_unequal_classes_are_trained_both_ways_and_compared(run: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(run)
    is_trained_twice = run == "balanced"  # the other head of a plain run only has shifted logits
    assert ("Training a plain head for comparison, as the classes are unequal." in result.printed) is is_trained_twice
    assert ("comparison, epoch 6 of 6: train loss" in result.printed) is is_trained_twice
    assert "The classes are unequal. Recall of the plain and of the balanced head:" in result.printed
    assert f"The bundle contains the {run} head." in result.printed
    rows = result.bundle.manifest["class_balance"]["comparison"]
    assert list(rows) == ["blue", "green", "red"]
    assert rows["red"][run] == result.bundle.manifest["metrics"]["recall"]["red"]
    card = (result.bundle.path / "README.md").read_text(encoding="utf-8")
    assert f"This head is {run}." in card
    assert "\n".join(format_head_comparison(rows)) in card
    assert "| balanced accuracy | " in card
    assert "| macro F1 | " in card


def test_both_heads_of_a_plain_and_a_balanced_run_are_the_same(
    data: Path, plain: SimpleNamespace, tiny_weights: Path, tmp_path: Path
) -> None:
    """The head for comparison is the one that a run with the recommended option exports."""
    equal = train(data, tiny_weights, tmp_path / "run", "--class-frequencies", "equal")
    ours, theirs = (run.bundle.manifest["class_balance"]["comparison"] for run in (plain, equal))
    assert ours == theirs


def test_equal_classes_are_not_compared(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    manifest = dict(open_bundle(tiny_bundle.path).manifest)
    assert manifest["class_balance"] is None
    write_model_card(tmp_path / "README.md", manifest)
    assert "Unequal classes" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_network_without_logits_is_rejected_before_training(data: Path, random_weights: object, tmp_path: Path) -> None:
    code, _, err = finetune(
        "train", "--data-dir", data, "--backbone", "squeezenet1_1", "--weights", "none", "--class-weights", "balanced",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("finetune: --class-weights, --sampling and --class-frequencies need a network whose last layer")
    assert not (tmp_path / "run").exists()


def test_recalls_are_compared_by_class() -> None:
    labels = np.repeat([0, 1], [50, 12])
    plain, weighted = labels.copy(), labels.copy()
    plain[50:60] = 0
    weighted[:2] = 1
    rows = compare_heads(labels, plain, weighted, classes=("cats", "cows", "dogs")[::2])
    assert rows["dogs"]["plain"] == wilson_interval(2, 12)
    assert rows["dogs"]["balanced"] == wilson_interval(12, 12)
    assert (rows["dogs"]["only_plain"], rows["dogs"]["only_balanced"]) == (0, 10)
    assert rows["dogs"]["p"] == pytest.approx(2 * mcnemar_p_value(0, 10))  # Holm: two classes
    assert rows["cats"]["p"] == mcnemar_p_value(2, 0)
    lines = format_head_comparison(rows)
    assert lines[2] == ("dogs   16.7% (4.7 to 44.8%)      100.0% (75.8 to 100.0%)   only plain 0, only balanced 10, p = 0.004")


def test_many_classes_show_the_largest_differences() -> None:
    labels = np.repeat(np.arange(30), 10)
    weighted = labels.copy()
    weighted[70:76] = 0
    rows = compare_heads(labels, labels, weighted, classes=[f"class {i}" for i in range(30)])
    lines = format_head_comparison(rows)
    assert len(lines) == 11
    assert lines[1].startswith("class 7 ")
