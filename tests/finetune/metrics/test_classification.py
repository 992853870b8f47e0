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
from finetune.metrics.classification import compute_metrics, format_summary
from finetune.metrics.reliability import calibration_error, equal_mass_bins
from finetune.metrics.roc import weighted_roc_auc
from models.artifacts.statistics import wilson_interval


def some_answers(
    photos: int, class_count: int, *, seed: int = 0, skill: float = 2.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Calibrated answers: labels are drawn from the very probabilities."""
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(size=(photos, class_count)) * skill)
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < rng.random((photos, 1))).sum(axis=1)
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
def test_wilson_gives_the_intervals_of_newcombe_1998(right: int, total: int, low: float, high: float) -> None:
    measure = wilson_interval(right, total)
    assert [measure["low"], measure["high"]] == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (5, 5), (395, 400), (4999, 5000)])
def test_wilson_agrees_with_scipy(right: int, total: int) -> None:
    theirs = binomtest(right, total).proportion_ci(method="wilson")
    measure = wilson_interval(right, total)
    assert [measure["low"], measure["high"]] == pytest.approx([theirs.low, theirs.high])


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(right: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"Expected a count from 0 to a positive total, got {right} of {total}"):
        wilson_interval(right, total)


@pytest.mark.parametrize("class_count", [2, 5])
def test_values_are_those_of_scikit_learn(class_count: int) -> None:
    labels, probabilities = some_answers(300, class_count)
    predicted = probabilities.argmax(axis=1)
    result = compute_metrics(labels, probabilities, classes=names(class_count), resamples=50)
    scores = probabilities[:, 1] if class_count == 2 else probabilities
    area = sklearn_metrics.roc_auc_score(labels, scores, multi_class="ovr")
    precision, recall, _, support = sklearn_metrics.precision_recall_fscore_support(labels, predicted)
    assert result["accuracy"]["value"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert result["log_loss"]["value"] == pytest.approx(sklearn_metrics.log_loss(labels, probabilities))
    assert result["roc_auc"]["value"] == pytest.approx(area)
    assert [share["value"] for share in result["precision"].values()] == pytest.approx(precision.tolist())
    assert [share["value"] for share in result["recall"].values()] == pytest.approx(recall.tolist())
    assert list(result["support"].values()) == support.tolist()
    assert result["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert (result["photos"], result["classes"], result["notes"]) == (300, names(class_count), [])


def test_resampled_areas_are_those_of_scikit_learn_ties_and_all() -> None:
    rng = np.random.default_rng(3)
    positive = rng.random(60) < 0.4
    scores = rng.integers(6, size=60) / 5
    weights = rng.integers(4, size=(60, 25)).astype(np.float32)
    theirs = [sklearn_metrics.roc_auc_score(positive, scores, sample_weight=column) for column in weights.T]
    np.testing.assert_allclose(weighted_roc_auc(positive, scores, weights), theirs, rtol=1e-12)


def test_resampled_means_vary_as_means_of_photos_do() -> None:
    values = np.random.default_rng(4).exponential(size=(400, 2))
    means = bootstrap_means(values, seed=0, resamples=2000)
    assert means.shape == (2000, 2)
    np.testing.assert_allclose(means.mean(axis=0), values.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(means.std(axis=0), values.std(axis=0) / 20, rtol=0.1)


def test_memory_is_bounded_without_losing_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities = some_answers(100, 3)
    monkeypatch.setattr("finetune.metrics.bootstrap.MAX_CELLS", 700)
    assert bootstrap_means(probabilities, seed=0, resamples=50).shape == (50, 3)
    result = compute_metrics(labels, probabilities, classes=names(3), resamples=50)
    assert all(measure["low"] < measure["high"] for measure in intervals_in(result))


def plain_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The textbook form: 15 groups of the sorted photos, weighted |accuracy - mean confidence|."""
    groups = np.array_split(np.argsort(confidence), 15)
    gaps = [len(group) * abs(correct[group].mean() - confidence[group].mean()) for group in groups]
    return float(sum(gaps) / len(confidence))


def test_calibration_error_is_the_textbook_one() -> None:
    rng = np.random.default_rng(5)
    confidence, correct = rng.uniform(0.5, 1, 300), rng.random(300) < 0.8
    measure = calibration_error(confidence, correct, seed=0, resamples=50)
    assert measure["value"] == pytest.approx(plain_calibration_error(confidence, correct))


def test_equal_confidences_share_a_bin_whatever_the_order_of_the_photos() -> None:
    rng = np.random.default_rng(6)
    confidence = np.concatenate([np.full(90, 0.999), rng.uniform(0.5, 0.9, 60)])
    correct = rng.random(150) < confidence
    shuffled = rng.permutation(150)
    assert len(np.unique(equal_mass_bins(confidence)[:90])) == 1
    assert equal_mass_bins(np.arange(150.0)).tolist() == np.repeat(np.arange(15), 10).tolist()
    one = calibration_error(confidence, correct, seed=0, resamples=20)
    other = calibration_error(confidence[shuffled], correct[shuffled], seed=0, resamples=20)
    assert one["value"] == pytest.approx(other["value"])


def test_calibration_error_of_a_calibrated_network_may_be_zero_and_that_of_another_not() -> None:
    labels, probabilities = some_answers(400, 2)
    sharper = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    result = compute_metrics(labels, probabilities, classes=names(2), uncalibrated=sharper, resamples=300)
    assert result["calibration_error"]["low"] == 0.0
    assert result["calibration_error_uncalibrated"]["low"] > 0.02
    assert result["log_loss_uncalibrated"]["value"] > result["log_loss"]["value"]


@pytest.mark.parametrize("measure", ["log_loss", "roc_auc", "calibration_error"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(measure: str) -> None:
    many = compute_metrics(*some_answers(100_000, 2, seed=99), classes=names(2), resamples=1)[measure]["value"]
    truth = 0.0 if measure == "calibration_error" else many
    held = 0
    for seed in range(40):
        result = compute_metrics(*some_answers(200, 2, seed=seed), classes=names(2), resamples=200)[measure]
        held += result["low"] <= truth <= result["high"]
    assert held >= 34


@pytest.mark.parametrize(("photos", "class_count", "skill"), [(1, 1, 1), (2, 2, 9), (7, 3, 1), (40, 12, 30), (90, 2, 50)])
def test_every_value_is_within_its_interval_and_all_is_json(photos: int, class_count: int, skill: float) -> None:
    for seed in range(8):
        labels, probabilities = some_answers(photos, class_count, seed=seed, skill=skill)
        result = compute_metrics(labels, probabilities, classes=names(class_count), uncalibrated=probabilities, resamples=20)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert all(0 <= measure["low"] <= measure["value"] <= measure["high"] for measure in intervals_in(result))
        assert all(result[name]["high"] <= 1 for name in ("accuracy", "calibration_error"))
        assert format_summary(result)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    labels, probabilities = some_answers(100, 3)

    def run(seed: int) -> dict[str, Any]:
        return compute_metrics(labels, probabilities, classes=names(3), seed=seed, resamples=100)

    assert run(1) == run(1)
    assert run(1)["log_loss"] != run(2)["log_loss"]


def test_what_is_not_defined_is_null_and_a_note_says_why() -> None:
    labels, probabilities = np.array([0, 0, 1]), np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])
    result = compute_metrics(labels, probabilities, classes=["cats", "dogs", "cows"], resamples=20)
    assert result["roc_auc"] is None
    assert result["precision"]["dogs"] is None
    assert result["recall"]["dogs"]["value"] == 0.0
    assert result["recall"]["cows"] is None
    notes = " ".join(result["notes"])
    assert "roc_auc is not defined: no photos of 'cows'" in notes
    assert "precision of 'dogs' is not defined: the class was predicted for no photo" in notes
    assert "recall of 'cows' is not defined: the class has no photos" in notes
    assert "not defined" in format_summary(result)


def test_one_class_only_has_no_roc_curve() -> None:
    result = compute_metrics(np.zeros(3, dtype=np.int64), np.ones((3, 1)), classes=["cats"], resamples=20)
    assert (result["roc_auc"], result["notes"]) == (None, ["roc_auc is not defined: there is one class only."])


def test_a_perfect_ranking_is_noted_as_more_certain_than_it_is() -> None:
    labels = np.tile([0, 1], 20)
    probabilities = np.where(labels[:, None] == [0, 1], 0.9, 0.1)
    result = compute_metrics(labels, probabilities, classes=names(2), resamples=20)
    assert result["roc_auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert any("perfect ranking" in note for note in result["notes"])


def test_every_measure_comes_with_its_method() -> None:
    labels, probabilities = some_answers(50, 2)
    result = compute_metrics(labels, probabilities, classes=names(2), resamples=77, seed=5)
    measures = {"accuracy", "precision", "recall", "log_loss", "roc_auc", "calibration_error"}
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
def test_what_does_not_fit_is_refused(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match=r"No photos|Expected labels of shape|Labels must be|not a probability distribution"):
        compute_metrics(labels, probabilities, classes=names(2))
    with pytest.raises(ValueError, match="not a probability distribution"):
        compute_metrics(np.array([0]), np.array([[0.5, 0.5]]), classes=names(2), uncalibrated=np.ones((1, 2)))


def test_summary_says_what_a_person_wants_to_know() -> None:
    labels = np.repeat([0, 1], 200)
    right = np.ones(400, dtype=bool)
    right[[0, 1, 200, 201, 202]] = False
    probabilities = np.where((labels[:, None] == [0, 1]) == right[:, None], 0.97, 0.03)
    result = compute_metrics(labels, probabilities, classes=["cats", "dogs"], uncalibrated=probabilities)
    lines = format_summary(result).splitlines()
    assert lines[0] == "accuracy           98.75 % (97.1 to 99.5 %), 395 of 400 photos right"
    assert lines[1].startswith("log loss           0.0739 (")
    assert ", before calibration 0.0739 (" in lines[1]
    assert lines[3].startswith("calibration error  1.75 % (0.")
    assert " ".join(lines[5].split()) == "cats 98.5 % (95.7 to 99.5 %) 99.0 % (96.4 to 99.7 %) 200"
    assert lines[6].startswith("dogs  ")


def test_summary_of_many_classes_shows_the_five_weakest() -> None:
    labels = np.repeat(np.arange(12), 10)
    predicted = labels.copy()
    for k in range(12):
        predicted[10 * k : 10 * k + k % 7] = (k + 1) % 12
    result = compute_metrics(labels, np.eye(12)[predicted], classes=[f"breed-{k}" for k in range(12)], resamples=20)
    lines = format_summary(result).splitlines()
    assert lines[4].startswith("weakest 5 of 12")
    assert [line.split()[0] for line in lines[5:10]] == ["breed-6", "breed-5", "breed-4", "breed-11", "breed-3"]
    assert len(lines) == 10
