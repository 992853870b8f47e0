"""The estimate of what more training images would bring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.metrics import learning_curve as module
from finetune.metrics.learning_curve import format_learning_curve, learning_curve
from finetune.reports.plots import plot_more_photos
from finetune.training.logistic_regression import fit_logistic_regression
from finetune.training.scaled_embeddings import ScaledEmbeddings, scale_embeddings


def noisy(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that overlap a little, in 40 dimensions. One of them is informative."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    embeddings = rng.normal(size=(count, 40))
    embeddings[:, 0] += 4 * (2 * labels - 1)
    return embeddings, labels


def test_the_curve_rises_and_its_extrapolation_contains_the_truth() -> None:
    embeddings, labels = noisy(240)
    options = {"num_classes": 2, "penalty": 1.0, "normalization": "none", "seed": 0}
    curve = learning_curve(embeddings, labels, np.arange(240), **options)  # type: ignore[arg-type]
    assert curve is not None
    assert curve["photos"] == [24, 48, 96, 192]
    assert curve["more_photos"] == 100
    losses = [row["value"] for row in curve["log_loss"]]
    assert losses[0] > losses[-1]
    assert curve["gain"]["log_loss"]["value"] < 0
    assert curve["gain"]["accuracy"]["value"] >= 0
    test, test_labels = noisy(4000, seed=1)
    measured = []
    for count in (240, 340):
        values = []
        for seed in range(20):
            train, train_labels = noisy(count, seed=100 + seed)
            scaled, divisor = scale_embeddings(train, "none")
            fit = fit_logistic_regression(scaled, train_labels, num_classes=2, penalty=1.0)
            values.append(-fit.log_probs(ScaledEmbeddings(test, divisor=divisor))[np.arange(4000), test_labels].mean())
        measured.append(np.mean(values))
    gain = curve["gain"]["log_loss"]
    assert gain["low"] <= measured[1] - measured[0] <= gain["high"]


def test_the_sentence_states_points_and_intervals() -> None:
    gain = {
        "accuracy": {"value": 0.00213, "low": 0.0004, "high": 0.0051},
        "log_loss": {"value": -0.0031, "low": -0.006, "high": -0.001},
    }
    assert format_learning_curve({"more_photos": 500, "gain": gain}) == (
        "500 more training photos would bring about +0.21 points of accuracy (95% interval +0.04 to +0.51) and -0.0031 log "
        "loss (-0.0060 to -0.0010), estimated from parts of the training photos."
    )


def test_predictions_without_errors_promise_nothing() -> None:
    labels = np.arange(80) % 2
    embeddings = np.stack([1 - labels, labels], axis=1).astype(float)
    curve = learning_curve(embeddings, labels, np.arange(80), num_classes=2, penalty=0.01, normalization="unit", seed=0)
    assert curve is not None
    assert curve["gain"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [row["value"] for row in curve["accuracy"]] == [1.0] * 4


def test_few_images_have_no_curve() -> None:
    embeddings, labels = noisy(module.MIN_IMAGES - 2)
    groups = np.arange(len(labels))
    assert learning_curve(embeddings, labels, groups, num_classes=2, penalty=1.0, normalization="unit", seed=0) is None


@pytest.mark.parametrize(("value", "expected"), [(467.0, 500), (15.0, 20), (14.0, 10), (30.0, 20), (75.0, 100), (1.0, 1)])
def test_the_number_of_more_photos_is_round(value: float, expected: int) -> None:
    assert module._round_number(value) == expected


def test_the_plot_is_written(tmp_path: Path) -> None:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    curve = {"photos": [10, 20], "more_photos": 10, "accuracy": [interval] * 2, "log_loss": [interval] * 2}
    path = plot_more_photos({**curve, "gain": {"accuracy": interval, "log_loss": interval}}, tmp_path / "curve.png")
    with Image.open(path) as image:
        assert min(image.size) > 300
