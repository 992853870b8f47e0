"""Operating points on synthetic predictions whose true precision is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from finetune.metrics.operating_points import (
    ABSTAINING,
    LEVEL,
    TopPredictions,
    abstention,
    bound_thresholds,
    describe_operating_point,
    format_operating_points,
    operating_points,
    parse_targets,
)
from models.artifacts.statistics import wilson_interval
from models.errors import ConfigError

CLASSES = ("cats", "dogs")
ONE_SIDED = LEVEL / len(ABSTAINING)


def draw(rng: np.random.Generator, count: int, *, calibrated: bool = True) -> TopPredictions:
    """Draw predictions. Without calibration a prediction is wrong three times as often as its probability says."""
    confidences = 0.5 + 0.5 * rng.beta(6.0, 0.4, count)
    wrong = (1 - confidences) * (1.0 if calibrated else 3.0)
    correct = rng.random(count) >= wrong
    predicted = rng.integers(2, size=count)
    return TopPredictions(np.where(correct, predicted, 1 - predicted), predicted, confidences)


def precision_of(predictions: TopPredictions, min_probability: float, label: int = 1) -> float:
    kept = (predictions.predicted == label) & (predictions.confidences >= min_probability)
    return float((predictions.labels == label)[kept].mean())


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("count", "target"), [(300, 0.9), (1500, 0.97), (1500, 0.999)])
def test_a_guarantee_holds_in_at_least_95_of_100_draws(calibrated: bool, count: int, target: float) -> None:
    """The truth is that of a million further draws. The guarantee also holds if the probabilities are not calibrated."""
    truth = draw(np.random.default_rng(99), 1_000_000, calibrated=calibrated)
    draws = 150
    broken, reached, abstaining = 0, 0, []
    for seed in range(draws):
        predictions = draw(np.random.default_rng(seed), count, calibrated=calibrated)
        point = operating_points(predictions, {"dogs": target}, classes=CLASSES)["dogs"]
        broken += precision_of(truth, point["min_probability"]) < point["guaranteed"]
        reached += point["guaranteed"] >= target
        abstaining.append(point["abstains"]["value"])
    assert broken <= 0.05 * draws
    assert reached == 0 if target == 0.999 else reached > 0.5 * draws
    assert max(abstaining) > 0


def test_the_thresholds_are_simultaneously_valid_for_any_choice() -> None:
    """Even the threshold with the most favorable error is covered: all bounds hold at once in 95% of draws."""
    truth = draw(np.random.default_rng(99), 1_000_000)
    broken = 0
    for seed in range(200):
        predictions = draw(np.random.default_rng(seed), 400)
        own = predictions.predicted == 1
        thresholds = bound_thresholds(predictions.confidences[own], predictions.labels[own] == 1)
        broken += any(precision_of(truth, threshold.min_probability) < threshold.bound for threshold in thresholds)
    assert broken <= 0.05 * 200


def predictions_of(confidences: NDArray[np.float64], correct: NDArray[np.bool_]) -> TopPredictions:
    predicted = np.ones(len(confidences), dtype=np.int64)
    return TopPredictions(np.where(correct, 1, 0), predicted, confidences)


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    confidences = np.linspace(0.5, 1.0, 1000)
    correct = np.ones(1000, dtype=bool)
    correct[[0, 5, 500]] = False
    thresholds = bound_thresholds(confidences, correct)
    assert [threshold.kept for threshold in thresholds] == [1000, 998, 995, 990, 980, 960, 920, 840, 680, 360]
    assert [threshold.correct for threshold in thresholds[:3]] == [997, 996, 993]
    for threshold in thresholds:
        test = binomtest(threshold.correct, threshold.kept)
        expected = test.proportion_ci(confidence_level=1 - 2 * ONE_SIDED, method="exact").low
        assert threshold.bound == pytest.approx(expected)
        assert int((confidences >= threshold.min_probability).sum()) == threshold.kept


def test_the_lowest_threshold_that_reaches_the_target_is_selected() -> None:
    confidences = np.linspace(0.5, 1.0, 1000)
    correct = np.arange(1000) >= 30  # the 30 least certain ones are wrong
    point = operating_points(predictions_of(confidences, correct), {"dogs": 0.99}, classes=CLASSES)["dogs"]
    assert (point["kept"], point["predicted"], point["needed"]) == (960, 1000, None)
    assert point["min_probability"] == pytest.approx(confidences[40], abs=1e-3)
    assert point["abstains"] == wilson_interval(40, 1000)
    assert point["precision"] == wilson_interval(960, 960)
    assert point["guaranteed"] == pytest.approx(ONE_SIDED ** (1 / 960))
    assert describe_operating_point(point) == (
        "a precision of at least 99% is guaranteed. Measured: 100.0%, 960 of 960. 4.0% (3.0 to 5.4%) of the photos predicted "
        "as this class have a probability below 0.5195 and get no label."
    )


def test_without_mistakes_every_photo_gets_a_label() -> None:
    point = operating_points(
        predictions_of(np.linspace(0.5, 1, 600), np.ones(600, dtype=bool)), {"dogs": 0.99}, classes=CLASSES
    )
    assert point["dogs"]["min_probability"] == 0.0
    assert describe_operating_point(point["dogs"]).endswith("600 of 600. Every photo gets a label.")


def test_too_few_photos_guarantee_less_and_say_how_many_are_needed() -> None:
    """Without mistakes n photos guarantee 0.005 ** (1 / n), so that 99% needs 528."""
    point = operating_points(
        predictions_of(np.linspace(0.5, 1, 400), np.ones(400, dtype=bool)), {"dogs": 0.99}, classes=CLASSES
    )
    assert point["dogs"]["guaranteed"] == pytest.approx(ONE_SIDED ** (1 / 400))
    assert point["dogs"]["needed"] == pytest.approx(np.log(ONE_SIDED) / np.log(0.99), abs=1)
    assert describe_operating_point(point["dogs"]) == (
        "a precision of 99% cannot be guaranteed with 400 photos predicted as this class (about 528 are needed). At least "
        "98.6% is guaranteed instead. Measured: 100.0%, 400 of 400. Every photo gets a label."
    )


def test_a_target_that_cannot_be_guaranteed_states_how_many_photos_get_no_label() -> None:
    confidences = np.linspace(0.5, 1.0, 500)
    correct = np.arange(500) >= 20
    points = operating_points(predictions_of(confidences, correct), {"dogs": 0.995}, classes=CLASSES)
    assert points["dogs"]["guaranteed"] < 0.995
    assert points["dogs"]["abstains"] == wilson_interval(20, 500)
    total = wilson_interval(20, 500)
    assert format_operating_points({"classes": points, "photos": 500, "abstains": total}, CLASSES) == [
        "dogs: a precision of 99.5% cannot be guaranteed with 500 photos predicted as this class (about 1,102 are needed). At "
        "least 98.9% is guaranteed instead. Measured: 100.0%, 480 of 480. 4.0% (2.6 to 6.1%) of the photos predicted as this "
        "class have a probability below 0.5190 and get no label.",
        "No threshold: cats.",
        "In total 4.0% (2.6 to 6.1%) of 500 photos are below a threshold.",
        "The target cannot be guaranteed for dogs. A lower target gives more photos a label.",
    ]


def test_more_photos_do_not_help_if_mistakes_are_as_certain_as_correct_predictions() -> None:
    correct = np.tile([True, True, True, False], 100)
    point = operating_points(predictions_of(np.linspace(0.5, 1, 400), correct), {"dogs": 0.9}, classes=CLASSES)["dogs"]
    assert point["needed"] is None
    assert point["guaranteed"] < 0.75
    assert "as this class (more photos like these do not help). At least 6" in describe_operating_point(point)


def test_equal_probabilities_are_left_out_together() -> None:
    confidences = np.repeat([0.6, 1.0], [10, 990])
    correct = np.repeat([False, True], [10, 990])
    thresholds = bound_thresholds(confidences, correct)
    assert [threshold.kept for threshold in thresholds] == [1000, 990]
    assert 0.6 < thresholds[1].min_probability <= 0.600001


def test_a_class_that_was_never_predicted_has_no_guarantee() -> None:
    predictions = predictions_of(np.linspace(0.5, 1, 50), np.ones(50, dtype=bool))
    points = operating_points(predictions, {"cats": 0.99, "dogs": 0.9}, classes=CLASSES)
    assert points["cats"]["guaranteed"] is None
    assert points["cats"]["min_probability"] == 0.0
    expected = (
        "a precision of 99% cannot be guaranteed, as no photo was predicted as this class (about 528 are needed). Every photo "
        "gets a label."
    )
    assert describe_operating_point(points["cats"]) == expected
    assert json.loads(json.dumps(points, allow_nan=False)) == points


def test_the_total_abstention_counts_all_photos() -> None:
    predictions = TopPredictions(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.array([0.6, 0.9, 0.6, 0.9]))
    points = {"dogs": {"min_probability": 0.7}}
    assert abstention(predictions, points, classes=CLASSES) == wilson_interval(1, 4)


def test_many_classes_list_those_that_are_furthest_from_their_target() -> None:
    predictions = draw(np.random.default_rng(0), 3000)
    classes = ("cats", "dogs", *(f"class {i}" for i in range(20)))
    points = operating_points(predictions, dict.fromkeys(classes, 0.9), classes=classes)
    lines = format_operating_points({"classes": points, "photos": 3000, "abstains": wilson_interval(30, 3000)}, classes)
    assert [line.partition(":")[0] for line in lines[:2]] == ["class 0", "class 1"]
    assert lines[10:12] == ["... and 12 more classes", "In total 1.0% (0.7 to 1.4%) of 3,000 photos are below a threshold."]
    assert lines[12].endswith(", class 19. A lower target gives more photos a label.")


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("0.99", {"cats": 0.99, "dogs": 0.99}),
        ("dogs=0.99", {"dogs": 0.99}),
        ("dogs=0.99, cats=0.95", {"cats": 0.95, "dogs": 0.99}),
        ("dogs=0.99,cats=none", {"cats": None, "dogs": 0.99}),
    ],
)
def test_targets_are_for_all_classes_or_by_class(text: str, targets: dict[str, float | None]) -> None:
    assert parse_targets(text, CLASSES) == targets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("99", "--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got '99')."),
        ("dogs=1", "--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got 'dogs=1')."),
        ("high", "--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got 'high')."),
        (
            "dog=0.9",
            "--target-precision names 'dog', which is not a class. Did you mean 'dogs'? The classes are cats, dogs.",
        ),
        ("dogs", "--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got 'dogs')."),
        ("cats=0.9,dogs", "--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got 'dogs')."),
        ("dogs=0.9,dogs=0.8", "--target-precision names 'dogs' twice. Remove one."),
    ],
)
def test_an_invalid_target_is_reported(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_targets(text, CLASSES)
    assert str(caught.value) == message


def test_class_names_may_contain_commas_and_equals_signs() -> None:
    classes = ("red, or so", "x=1", "blue")
    targets = {"red, or so": 0.9, "x=1": 0.8, "blue": None}
    assert parse_targets("red, or so=0.9,x=1=0.8,blue=none", classes) == targets
