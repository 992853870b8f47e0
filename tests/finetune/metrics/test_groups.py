"""Intervals for photos in groups."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.metrics.classification import compute_metrics
from finetune.metrics.groups import effective_size, proportion_interval, with_group_intervals
from models.artifacts.statistics import wilson_interval


def grouped_outcomes(
    rng: np.random.Generator, *, mean: float, correlation: float, groups: int, photos: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Draw whether photos are correct. Each group has its own accuracy, from a beta distribution."""
    accuracy = rng.beta(mean * (1 / correlation - 1), (1 - mean) * (1 / correlation - 1), groups)
    rows = np.repeat(np.arange(groups), rng.integers(1, 2 * photos, groups))
    return rng.random(len(rows)) < accuracy[rows], rows


def test_the_interval_covers_the_true_proportion_where_that_of_independent_photos_does_not() -> None:
    rng = np.random.default_rng(0)
    covered = {"groups": 0, "photos": 0}
    for _ in range(300):
        correct, groups = grouped_outcomes(rng, mean=0.9, correlation=0.3, groups=40, photos=10)
        for kind, interval in (
            ("groups", proportion_interval(correct, groups)),
            ("photos", proportion_interval(correct, None)),
        ):
            covered[kind] += interval["low"] <= 0.9 <= interval["high"]
    assert covered["groups"] / 300 > 0.88
    assert covered["photos"] / 300 < 0.7


def test_groups_of_one_photo_are_independent_photos() -> None:
    correct = np.array([True] * 18 + [False] * 2)
    assert effective_size(correct, np.arange(20)) == 20
    assert proportion_interval(correct, np.arange(20)) == wilson_interval(18, 20)


def test_copies_do_not_make_an_interval_narrower() -> None:
    correct, groups = np.array([True] * 18 + [False] * 2), np.arange(20)
    once = proportion_interval(correct, groups)
    copied = proportion_interval(np.repeat(correct, 10), np.repeat(groups, 10))
    assert copied["value"] == once["value"]
    assert copied["low"] <= once["low"]
    assert copied["high"] >= once["high"]


def test_without_mistakes_each_group_counts_as_one_photo() -> None:
    interval = proportion_interval(np.ones(200, dtype=bool), np.repeat(np.arange(20), 10))
    assert interval["value"] == 1.0
    assert interval["low"] < wilson_interval(20, 20)["low"] < 0.9
    assert proportion_interval(np.ones(50, dtype=bool), np.zeros(50, dtype=np.int64))["low"] < 0.25  # a single group


def predictions(seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Return labels, probabilities and groups of 40 groups of 10 photos, each with its own difficulty."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(40), 10)
    labels = rng.integers(0, 3, 400)
    scores = rng.normal(size=(400, 3))
    scores[np.arange(400), labels] += rng.normal(2, 2, 40)[groups]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return labels, probabilities, groups


def width(measure: dict[str, float]) -> float:
    return measure["high"] - measure["low"]


def test_every_interval_allows_for_groups_and_no_value_changes() -> None:
    labels, probabilities, groups = predictions()
    plain = compute_metrics(labels, probabilities, classes=["a", "b", "c"], uncalibrated=probabilities)
    metrics = with_group_intervals(plain, labels, probabilities, groups, uncalibrated=probabilities)
    assert metrics["groups"] == 40
    assert "The photos come in 40 groups" in metrics["methods"]["groups"]
    assert metrics["notes"][-1] == "The intervals allow for 40 groups of photos."
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc", "log_loss_uncalibrated"):
        assert metrics[name]["value"] == pytest.approx(plain[name]["value"])
        assert width(metrics[name]) > 1.2 * width(plain[name]), name
    for name in ("precision", "recall"):
        for class_, measure in metrics[name].items():
            assert measure["value"] == pytest.approx(plain[name][class_]["value"])
            assert width(measure) > width(plain[name][class_])
    assert metrics["calibration_error"]["value"] == pytest.approx(plain["calibration_error"]["value"])
    assert metrics["calibration_error"]["high"] > plain["calibration_error"]["value"]
    assert with_group_intervals(plain, labels, probabilities, groups, uncalibrated=probabilities) == metrics


def test_groups_of_one_photo_give_about_the_plain_intervals() -> None:
    labels, probabilities, _ = predictions(1)
    plain = compute_metrics(labels, probabilities, classes=["a", "b", "c"])
    metrics = with_group_intervals(plain, labels, probabilities, np.arange(400))
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc"):
        assert width(metrics[name]) == pytest.approx(width(plain[name]), rel=0.25)


def test_the_top_five_of_many_classes_allow_for_groups() -> None:
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(20), 10), rng.integers(0, 12, 200)
    probabilities = rng.dirichlet(np.ones(12), 200)
    probabilities[groups < 10, labels[groups < 10]] += 1
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    plain = compute_metrics(labels, probabilities, classes=[f"class {i}" for i in range(12)])
    metrics = with_group_intervals(plain, labels, probabilities, groups)
    assert metrics["top_5_accuracy"]["value"] == pytest.approx(plain["top_5_accuracy"]["value"])
    assert width(metrics["top_5_accuracy"]) > 1.5 * width(plain["top_5_accuracy"])


def test_a_class_without_photos_stays_undefined() -> None:
    labels, probabilities, groups = predictions()
    labels = np.where(labels == 2, 0, labels)
    plain = compute_metrics(labels, probabilities, classes=["a", "b", "c"])
    metrics = with_group_intervals(plain, labels, probabilities, groups)
    assert metrics["recall"]["c"] is None
    assert metrics["roc_auc"] is None
