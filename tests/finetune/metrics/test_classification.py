from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from finetune.metrics.bootstrap import bootstrap_means
from finetune.metrics.calibration import calibration_error, equal_mass_bins
from finetune.metrics.classification import compute_metrics, format_summary, weighted_roc_auc
from models.artifacts.statistics import mean_of_proportions, wilson_interval


def calibrated_predictions(
    count: int, class_count: int, *, seed: int = 0, skill: float = 2.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return labels drawn from random probabilities, and the probabilities."""
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(size=(count, class_count)) * skill)
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return np.minimum(labels, class_count - 1), probabilities


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def intervals_in(value: object) -> Iterator[dict[str, float]]:
    if isinstance(value, dict):
        if set(value) == {"value", "low", "high"}:
            yield value
        else:
            for inner in value.values():
                yield from intervals_in(inner)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_match_newcombe_1998(right: int, total: int, low: float, high: float) -> None:
    measure = wilson_interval(right, total)
    assert [measure["low"], measure["high"]] == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (5, 5), (395, 400), (4999, 5000)])
def test_wilson_agrees_with_scipy(right: int, total: int) -> None:
    expected = binomtest(right, total).proportion_ci(method="wilson")
    measure = wilson_interval(right, total)
    assert [measure["low"], measure["high"]] == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_rejects_invalid_counts(right: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"Expected a count from 0 to a positive total, got {right} of {total}"):
        wilson_interval(right, total)


@pytest.mark.parametrize("class_count", [2, 5])
def test_values_match_scikit_learn(class_count: int) -> None:
    labels, probabilities = calibrated_predictions(300, class_count)
    predicted = probabilities.argmax(axis=1)
    result = compute_metrics(labels, probabilities, classes=names(class_count), resamples=50)
    scores = probabilities[:, 1] if class_count == 2 else probabilities
    area = sklearn_metrics.roc_auc_score(labels, scores, multi_class="ovr")
    precision, recall, _, support = sklearn_metrics.precision_recall_fscore_support(labels, predicted)
    assert result["accuracy"]["value"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert result["log_loss"]["value"] == pytest.approx(sklearn_metrics.log_loss(labels, probabilities))
    assert result["roc_auc"]["value"] == pytest.approx(area)
    assert [interval["value"] for interval in result["precision"].values()] == pytest.approx(precision.tolist())
    assert [interval["value"] for interval in result["recall"].values()] == pytest.approx(recall.tolist())
    assert list(result["support"].values()) == support.tolist()
    assert result["balanced_accuracy"]["value"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    assert result["macro_f1"]["value"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    assert "top_5_accuracy" not in result
    assert result["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert (result["photos"], result["classes"], result["notes"]) == (300, names(class_count), [])


def test_top_5_accuracy_matches_scikit_learn() -> None:
    labels, probabilities = calibrated_predictions(400, 12, skill=1.0)
    result = compute_metrics(labels, probabilities, classes=names(12), resamples=20)
    expected = sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5)
    assert 0.5 < expected < 0.95
    assert result["top_5_accuracy"] == wilson_interval(round(expected * 400), 400)
    assert "top_5_accuracy" in result["methods"]
    assert "top-5 accuracy" in format_summary(result)


def test_equal_probabilities_are_no_top_5_hit_for_every_class() -> None:
    result = compute_metrics(np.arange(10), np.full((10, 10), 0.1), classes=names(10), resamples=20)
    assert result["top_5_accuracy"]["value"] == 0.5
    assert result["accuracy"]["value"] == 0.1


def test_macro_f1_of_classes_without_photos_matches_scikit_learn() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 2, 1, 0, 3])
    result = compute_metrics(labels, np.eye(5)[predicted], classes=names(5), resamples=200)
    assert result["macro_f1"]["value"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    assert result["balanced_accuracy"]["value"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_the_interval_of_a_perfect_balanced_accuracy_has_a_width() -> None:
    """A bootstrap would give 100% to 100%. With 1,000 photos of one class and 10 of the other, those 10 decide."""
    one = wilson_interval(10, 10)
    both = mean_of_proportions([(1000, 1000), (10, 10)])
    assert both["value"] == both["high"] == 1.0
    assert both["low"] == pytest.approx((1 + one["low"]) / 2, abs=1e-4)
    assert mean_of_proportions([(10, 10)]) == pytest.approx(one)


def test_the_interval_of_the_balanced_accuracy_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    truth, sizes = np.array([0.99, 0.8, 0.95]), np.array([500, 20, 60])
    draws = rng.binomial(sizes, truth, size=(2000, 3))
    intervals = [mean_of_proportions([(int(k), int(n)) for k, n in zip(row, sizes, strict=True)]) for row in draws]
    covered = np.mean([interval["low"] <= truth.mean() <= interval["high"] for interval in intervals])
    assert 0.94 <= covered <= 0.985


def test_weighted_areas_match_scikit_learn_including_ties() -> None:
    rng = np.random.default_rng(3)
    positive = rng.random(60) < 0.4
    scores = rng.integers(6, size=60) / 5
    weights = rng.integers(4, size=(60, 25)).astype(np.float32)
    expected = [sklearn_metrics.roc_auc_score(positive, scores, sample_weight=column) for column in weights.T]
    np.testing.assert_allclose(weighted_roc_auc(positive, scores, weights), expected, rtol=1e-12)


def test_bootstrap_means_have_the_standard_error() -> None:
    values = np.random.default_rng(4).exponential(size=(400, 2))
    means = bootstrap_means(values, seed=0, resamples=2000)
    assert means.shape == (2000, 2)
    np.testing.assert_allclose(means.mean(axis=0), values.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(means.std(axis=0), values.std(axis=0) / 20, rtol=0.1)


def test_memory_is_bounded_without_losing_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities = calibrated_predictions(100, 3)
    monkeypatch.setattr("finetune.metrics.bootstrap.MAX_CELLS", 700)
    assert bootstrap_means(probabilities, seed=0, resamples=50).shape == (50, 3)
    result = compute_metrics(labels, probabilities, classes=names(3), resamples=50)
    assert all(measure["low"] < measure["high"] for measure in intervals_in(result))


def plain_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Compute the textbook form: 15 groups of the sorted images, weighted |accuracy - mean confidence|."""
    groups = np.array_split(np.argsort(confidence), 15)
    gaps = [len(group) * abs(correct[group].mean() - confidence[group].mean()) for group in groups]
    return float(sum(gaps) / len(confidence))


def test_calibration_error_matches_the_textbook_form() -> None:
    rng = np.random.default_rng(5)
    confidence, correct = rng.uniform(0.5, 1, 300), rng.random(300) < 0.8
    measure = calibration_error(confidence, correct, seed=0, resamples=50)
    assert measure["value"] == pytest.approx(plain_calibration_error(confidence, correct))


def test_equal_confidences_share_a_bin_in_any_order() -> None:
    rng = np.random.default_rng(6)
    confidence = np.concatenate([np.full(90, 0.999), rng.uniform(0.5, 0.9, 60)])
    correct = rng.random(150) < confidence
    shuffled = rng.permutation(150)
    assert len(np.unique(equal_mass_bins(confidence)[:90])) == 1
    assert equal_mass_bins(np.arange(150.0)).tolist() == np.repeat(np.arange(15), 10).tolist()
    one = calibration_error(confidence, correct, seed=0, resamples=20)
    other = calibration_error(confidence[shuffled], correct[shuffled], seed=0, resamples=20)
    assert one["value"] == pytest.approx(other["value"])


def test_the_interval_of_the_calibration_error_contains_zero_only_if_calibrated() -> None:
    labels, probabilities = calibrated_predictions(400, 2)
    sharper = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    result = compute_metrics(labels, probabilities, classes=names(2), uncalibrated=sharper, resamples=300)
    assert result["calibration_error"]["low"] == 0.0
    assert result["calibration_error_uncalibrated"]["low"] > 0.02
    assert result["log_loss_uncalibrated"]["value"] > result["log_loss"]["value"]


@pytest.mark.parametrize("measure", ["log_loss", "roc_auc", "calibration_error", "balanced_accuracy", "macro_f1"])
def test_intervals_have_their_nominal_coverage(measure: str) -> None:
    many = compute_metrics(*calibrated_predictions(100_000, 2, seed=99), classes=names(2), resamples=1)[measure]["value"]
    truth = 0.0 if measure == "calibration_error" else many
    covered = 0
    for seed in range(40):
        result = compute_metrics(*calibrated_predictions(200, 2, seed=seed), classes=names(2), resamples=200)[measure]
        covered += result["low"] <= truth <= result["high"]
    assert covered >= 34


@pytest.mark.parametrize(("count", "class_count", "skill"), [(1, 1, 1), (2, 2, 9), (7, 3, 1), (40, 12, 30), (90, 2, 50)])
def test_values_are_within_their_intervals_and_json_serializable(count: int, class_count: int, skill: float) -> None:
    for seed in range(8):
        labels, probabilities = calibrated_predictions(count, class_count, seed=seed, skill=skill)
        result = compute_metrics(labels, probabilities, classes=names(class_count), uncalibrated=probabilities, resamples=20)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert all(0 <= measure["low"] <= measure["value"] <= measure["high"] for measure in intervals_in(result))
        assert all(result[name]["high"] <= 1 for name in ("accuracy", "calibration_error"))
        assert format_summary(result)


def test_results_are_reproducible_by_seed() -> None:
    labels, probabilities = calibrated_predictions(100, 3)

    def run(seed: int) -> dict[str, Any]:
        return compute_metrics(labels, probabilities, classes=names(3), seed=seed, resamples=100)

    assert run(1) == run(1)
    assert run(1)["log_loss"] != run(2)["log_loss"]


def test_undefined_metrics_are_none_with_a_note() -> None:
    labels, probabilities = np.array([0, 0, 1]), np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])
    result = compute_metrics(labels, probabilities, classes=["cats", "dogs", "cows"], resamples=20)
    assert result["roc_auc"] is None
    assert result["precision"]["dogs"] is None
    assert result["recall"]["dogs"]["value"] == 0.0
    assert result["recall"]["cows"] is None
    notes = " ".join(result["notes"])
    assert "roc_auc is not defined: no photos of 'cows'" in notes
    assert "precision is not defined for 2 classes: each was never predicted ('dogs', 'cows')." in notes
    assert "recall of 'cows' is not defined: the class has no photos" in notes
    assert "not defined" in format_summary(result)


def test_undefined_metrics_of_many_classes_are_one_note_each() -> None:
    labels, probabilities = np.zeros(4, dtype=np.int64), np.full((4, 500), 1 / 500)
    result = compute_metrics(labels, probabilities, classes=names(500), resamples=20)
    assert len(result["notes"]) <= 4
    assert any(note.endswith(", ... (499 in total)).") for note in result["notes"])
    assert max(map(len, result["notes"])) < 200


def test_a_single_class_has_no_roc_curve() -> None:
    result = compute_metrics(np.zeros(3, dtype=np.int64), np.ones((3, 1)), classes=["cats"], resamples=20)
    assert result["roc_auc"] is None
    assert result["notes"] == [
        "roc_auc is not defined: there is only one class.",
        "Macro F1 is 1.0 in every bootstrap sample, so its interval is not informative.",
    ]


def test_a_perfect_ranking_is_noted() -> None:
    labels = np.tile([0, 1], 20)
    probabilities = np.where(labels[:, None] == [0, 1], 0.9, 0.1)
    result = compute_metrics(labels, probabilities, classes=names(2), resamples=20)
    assert result["roc_auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "ROC AUC is 1.0 in every bootstrap sample, so its interval is not informative." in result["notes"]


def test_every_metric_has_its_method() -> None:
    labels, probabilities = calibrated_predictions(50, 2)
    result = compute_metrics(labels, probabilities, classes=names(2), resamples=77, seed=5)
    measures = {"accuracy", "balanced_accuracy", "macro_f1", "precision", "recall", "log_loss", "roc_auc", "calibration_error"}
    assert measures <= set(result["methods"])
    assert measures <= set(result)
    assert "77 resamples of the photos, seed 5" in result["methods"]["log_loss"]


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        (np.zeros(0, dtype=np.int64), np.zeros((0, 2))),
        (np.array([0]), np.ones((1, 3)) / 3),
        (np.array([2]), np.ones((1, 2)) / 2),
        (np.array([0]), np.array([[2.0, 3.0]])),
    ],
)
def test_invalid_predictions_are_rejected(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
    expected = r"Expected at least one photo|No photos|Expected labels of shape|Labels must be|not a probability distribution"
    with pytest.raises(ValueError, match=expected):
        compute_metrics(labels, probabilities, classes=names(2))
    with pytest.raises(ValueError, match="not a probability distribution"):
        compute_metrics(np.array([0]), np.array([[0.5, 0.5]]), classes=names(2), uncalibrated=np.ones((1, 2)))


def test_summary() -> None:
    labels = np.repeat([0, 1], 200)
    correct = np.ones(400, dtype=bool)
    correct[[0, 1, 200, 201, 202]] = False
    probabilities = np.where((labels[:, None] == [0, 1]) == correct[:, None], 0.97, 0.03)
    result = compute_metrics(
        labels,
        probabilities,
        classes=["cats", "dogs"],
        uncalibrated=probabilities**2 / (probabilities**2).sum(1, keepdims=True),
    )
    lines = format_summary(result).splitlines()
    assert lines[0] == "accuracy           98.75% (97.1 to 99.5%), 395 of 400 photos correct"
    assert lines[1] == "balanced accuracy  98.75% (96.8 to 99.4%)"
    assert lines[2].startswith("macro F1           0.9875 (0.9")
    assert lines[3].startswith("log loss           0.0739 (")
    assert ", before calibration 0.0879 (" in lines[3]
    assert lines[5].startswith("calibration error  1.75% (0.")
    assert " ".join(lines[7].split()) == "cats 98.5% (95.7 to 99.5%) 99.0% (96.4 to 99.7%) 200"
    assert lines[8].startswith("dogs  ")


def test_the_summary_of_an_older_bundle_has_fewer_metrics() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    result = compute_metrics(np.array([0, 1]), probabilities, classes=["cats", "dogs"], resamples=20)
    del result["balanced_accuracy"], result["macro_f1"]
    text = format_summary(result)
    assert text.startswith("accuracy           100.00%")
    assert "balanced" not in text


def test_the_summary_omits_uncalibrated_values_that_do_not_differ() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    result = compute_metrics(np.array([0, 1]), probabilities, classes=["cats", "dogs"], uncalibrated=probabilities)
    assert "before calibration" not in format_summary(result)


def test_summary_of_many_classes_shows_the_five_lowest_recalls() -> None:
    labels = np.repeat(np.arange(12), 10)
    predicted = labels.copy()
    for k in range(12):
        predicted[10 * k : 10 * k + k % 7] = (k + 1) % 12
    result = compute_metrics(labels, np.eye(12)[predicted], classes=[f"breed-{k}" for k in range(12)], resamples=20)
    lines = format_summary(result).splitlines()
    assert lines[3].startswith("top-5 accuracy     ")
    assert lines[7].startswith("lowest 5 of 12")
    assert [line.split()[0] for line in lines[8:13]] == ["breed-6", "breed-5", "breed-4", "breed-11", "breed-3"]
    assert len(lines) == 13
