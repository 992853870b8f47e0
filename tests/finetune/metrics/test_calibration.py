from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from finetune.metrics.calibration import apply_temperature, fit_temperature
from models.artifacts.predictions import cross_entropy


def sample_labels(true_log_probs: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    probabilities = np.exp(true_log_probs)
    return np.array([rng.choice(len(row), p=row) for row in probabilities / probabilities.sum(axis=1, keepdims=True)])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_true_temperature_is_recovered(temperature: float) -> None:
    rng = np.random.default_rng(1)
    true = log_softmax(rng.normal(size=(4000, 3)) * 2, axis=1)
    labels = sample_labels(true, rng)
    assert fit_temperature(log_softmax(true * temperature, axis=1), labels) == pytest.approx(temperature, rel=0.06)


def test_fitting_lowers_the_loss_of_an_overconfident_network_and_keeps_its_labels() -> None:
    rng = np.random.default_rng(2)
    true = log_softmax(rng.normal(size=(300, 4)), axis=1)
    labels = sample_labels(true, rng)
    overconfident = log_softmax(3 * true, axis=1)
    calibrated = apply_temperature(overconfident, fit_temperature(overconfident, labels))
    assert cross_entropy(labels, calibrated).mean() < 0.8 * cross_entropy(labels, np.exp(overconfident)).mean()
    np.testing.assert_array_equal(calibrated.argmax(axis=1), overconfident.argmax(axis=1))


def test_perfect_separation_does_not_raise_confidence() -> None:
    labels = np.tile([0, 1], 200)
    log_probs = log_softmax(np.where(labels[:, None] == [0, 1], 3.0, -3.0), axis=1)
    assert fit_temperature(log_probs, labels) == pytest.approx(1.0, abs=1e-4)
    labels[0] = 1  # one mistake is enough to estimate a temperature below 1
    assert 0.1 < fit_temperature(log_probs, labels) < 1.2


def test_few_mistakes_change_the_temperature_little() -> None:
    """Two mistakes of 400, of little confidence: the likelihood alone has its maximum at 0.40."""
    labels = np.tile([0, 1], 200)
    log_probs = log_softmax(np.where(labels[:, None] == [0, 1], 1.5, -1.5), axis=1)
    log_probs[:2] = np.log([[0.4, 0.6], [0.6, 0.4]])
    many = fit_temperature(np.tile(log_probs, (100, 1)), np.tile(labels, 100))
    assert many < 0.5
    assert many + 0.1 < fit_temperature(log_probs, labels) < 1.0


@pytest.mark.parametrize(("correct", "bound"), [(True, 0.05), (False, 20.0)])
def test_the_temperature_stays_within_its_bounds(correct: bool, bound: float) -> None:
    labels = np.zeros(100_000, dtype=np.int64) if correct else np.ones(100_000, dtype=np.int64)
    log_probs = np.tile(log_softmax([0.01 if correct else 100.0, 0.0]), (100_000, 1))
    log_probs[0], labels[0] = np.log(0.5), 1  # a mistake that no temperature changes
    assert fit_temperature(log_probs, labels) == pytest.approx(bound, rel=1e-3)


def test_without_evidence_the_temperature_is_one() -> None:
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=np.int64)) == pytest.approx(1.0, abs=1e-4)
    assert fit_temperature(np.full((50, 2), np.log(0.5)), np.tile([0, 1], 25)) == pytest.approx(1.0, abs=1e-4)


def test_apply_temperature_is_a_stable_float64_softmax() -> None:
    log_probs = np.array([[0.0, -2000.0], [-1e-7, -16.0]], dtype=np.float32)
    probabilities = apply_temperature(log_probs, 0.05)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    np.testing.assert_allclose(apply_temperature(np.log([[0.8, 0.2]]), 2.0), [[2 / 3, 1 / 3]])
    np.testing.assert_allclose(apply_temperature(np.log([[0.8, 0.2]]), 1.0), [[0.8, 0.2]])


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_invalid_temperatures_are_rejected(temperature: float) -> None:
    with pytest.raises(ValueError, match="positive number"):
        apply_temperature(np.zeros((1, 2)), temperature)


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (np.zeros(3), np.zeros(3, dtype=np.int64), "shape"),
        (np.array([[0.0, -np.inf]]), np.array([0]), "finite"),
        (np.array([[0.0, np.nan]]), np.array([0]), "finite"),
        (np.zeros((3, 2)), np.zeros(2, dtype=np.int64), "Expected log-probabilities"),
        (np.zeros((2, 2)), np.array([0, 2]), "Labels range"),
        (np.zeros((2, 2)), np.array([0, -1]), "Labels range"),
    ],
)
def test_invalid_inputs_are_rejected(log_probs: NDArray[np.float64], labels: NDArray[np.int64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperature(log_probs, labels)
