from __future__ import annotations

import numpy as np
import pytest

from models.artifacts.label_issues import (
    can_judge_labels,
    class_thresholds,
    find_label_issues,
    normalized_margins,
    rank_label_issues,
    suggested_labels,
)
from models.artifacts.predictions import Predictions


def make_predictions(labels: list[int], probabilities: list[list[float]]) -> Predictions:
    names = tuple(f"{i}.jpg" for i in range(len(labels)))
    classes = tuple("abc"[: len(probabilities[0])])
    return Predictions(classes, names, np.array(labels, dtype=np.int64), np.array(probabilities), names, names)


def test_image_confidently_of_another_class_is_a_label_issue() -> None:
    """Thresholds by hand: a (0.9 + 0.7 + 0.2) / 3 = 0.6, b (0.6 + 0.8 + 0.45) / 3 = 0.617."""
    rows = [[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.2, 0.8], [0.55, 0.45]]
    predictions = make_predictions([0, 0, 0, 1, 1, 1] * 10, rows * 10)  # six images are too few to exceed chance
    assert class_thresholds(predictions) == pytest.approx([0.6, 1.85 / 3])
    # the last prediction is incorrect, but below its threshold
    assert find_label_issues(predictions).tolist() == [False, False, True, False, False, False] * 10
    assert suggested_labels(predictions).tolist() == [0, 0, 1, 1, 1, 1] * 10
    assert normalized_margins(predictions) == pytest.approx([0.9, 0.7, 0.2, 0.6, 0.8, 0.45] * 10)
    assert rank_label_issues(predictions).tolist() == list(range(2, 60, 6))


def test_most_probable_class_above_its_threshold_is_suggested() -> None:
    """Class c has a low threshold, so both it and the most probable class can be above theirs."""
    rows = [[0.5, 0.2, 0.3], [0.3, 0.5, 0.2], [0.4, 0.3, 0.3], [0.45, 0.1, 0.45]]
    predictions = make_predictions([0, 1, 2, 2], rows)
    assert class_thresholds(predictions) == pytest.approx([0.5, 0.5, 0.375])
    assert suggested_labels(predictions).tolist() == [0, 1, 2, 2]
    predictions = make_predictions([0, 1, 2, 2], [*rows[:3], [0.52, 0.03, 0.45]])
    assert suggested_labels(predictions).tolist() == [0, 1, 2, 0]


def test_lowest_margin_comes_first() -> None:
    rows = [[0.9, 0.1]] * 8 + [[0.1, 0.9]] * 8 + [[0.95, 0.05], [0.9, 0.1], [0.03, 0.97]]
    predictions = make_predictions([0] * 8 + [1] * 8 + [1, 1, 0], rows)
    assert rank_label_issues(predictions).tolist() == [18, 16, 17]


def test_flipped_labels_are_found() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 600)
    logits = rng.normal(size=(600, 3)) + 7 * np.eye(3)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = truth.copy()
    labels[:20] = (truth[:20] + 1) % 3
    issues = set(rank_label_issues(make_predictions(labels.tolist(), probabilities.tolist())).tolist())
    assert len(issues & set(range(20))) >= 18
    assert len(issues - set(range(20))) <= 12


def test_class_without_images_and_empty_predictions() -> None:
    predictions = make_predictions([0, 0], [[0.2, 0.8], [0.9, 0.1]])
    assert class_thresholds(predictions).tolist() == [pytest.approx(0.55), np.inf]
    assert not find_label_issues(predictions).any()
    empty = Predictions(("a", "b"), (), np.zeros(0, dtype=np.int64), np.zeros((0, 2)), (), ())
    assert (find_label_issues(empty).shape, rank_label_issues(empty).shape) == ((0,), (0,))


def test_model_at_chance_reports_no_label_issues() -> None:
    """22 classes, 309 images and predictions that are independent of the labels."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(22), 309)
    names = tuple(map(str, range(309)))
    classes = tuple(f"class {i}" for i in range(22))
    predictions = Predictions(classes, names, rng.integers(0, 22, 309), probabilities, names, names)
    assert (suggested_labels(predictions) != predictions.labels).sum() > 200
    assert not find_label_issues(predictions).any()
    assert rank_label_issues(predictions).size == 0


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ([[90, 10], [10, 90]], True),
        ([[55, 45], [45, 55]], False),
        ([[950, 0], [50, 0]], False),  # always the most frequent class: 95% correct
        ([[940, 10], [10, 40]], True),
        ([[0, 0], [0, 0]], False),
        ([[10, 90], [90, 10]], False),
    ],
)
def test_accuracy_must_exceed_chance(confusion: list[list[int]], expected: bool) -> None:
    assert can_judge_labels(np.array(confusion)) is expected
