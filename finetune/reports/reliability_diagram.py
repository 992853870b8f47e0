"""The reliability diagram: accuracy against confidence, before and after calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from finetune.metrics.reliability import calibration_error, equal_mass_bins
from finetune.reports.plots import BLUE, FAINT, ORANGE, save_png
from models.artifacts.statistics import wilson_interval

CROWDED = 0.95  # with a median confidence above this, a linear axis shows too little
MIN_GAP = 1e-5  # smallest distance from 1 that the stretched axis resolves
EVEN_TICKS = tuple(tenth / 10 for tenth in range(11))
STRETCHED_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)
HISTOGRAM_BARS = 30


def plot_reliability_diagram(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    uncalibrated: NDArray[np.float64] | None,
    path: Path,
    *,
    seed: int,
) -> Path:
    """Plot accuracy against confidence in 15 equal-mass bins with 95% Wilson intervals, above a histogram of confidence.

    If most confidences are close to 100%, the confidence axis is logarithmic in the distance from 100%.

    Args:
        labels: True classes, (N,).
        probabilities: Predicted probabilities, (N, C).
        uncalibrated: Probabilities before calibration, (N, C). If set, a second column shows them.
        path: The PNG file.
        seed: Seed of the bootstrap.
    """
    columns = [("Predictions", probabilities)]
    if uncalibrated is not None:
        columns = [("Before calibration", uncalibrated), ("After calibration", probabilities)]
    stretched = max(float(np.median(values.max(axis=1))) for _, values in columns) > CROWDED
    stretch = ", stretched toward 100" if stretched else ""
    least_sure = min(float(values.max(axis=1).min()) for _, values in columns)
    lowest = max(tick for tick in (STRETCHED_TICKS if stretched else EVEN_TICKS)[:-1] if tick <= least_sure)
    figure = Figure(figsize=(5.6 * len(columns), 7.2), layout="constrained")
    figure.suptitle(f"Accuracy against confidence on {len(labels):,} photos", x=0.01, ha="left")
    panels = figure.subplots(2, len(columns), squeeze=False, height_ratios=(3, 1), sharex=True, sharey="row")
    for (name, values), upper, lower in zip(columns, *panels, strict=True):
        confidence, correct = np.minimum(values.max(axis=1), 1.0), values.argmax(axis=1) == labels
        error = calibration_error(confidence, correct, seed=seed, resamples=1000)
        percents = [100.0 * error[end] for end in ("value", "low", "high")]
        upper.set_title("{}: calibration error {:.1f}% ({:.1f} to {:.1f}%)".format(name, *percents))
        _draw_bins(upper, confidence, correct, lowest)
        _draw_histogram(lower, confidence, correct, lowest, stretched=stretched)
        _set_confidence_axis(upper, lowest, stretched=stretched)
        _set_confidence_axis(lower, lowest, stretched=stretched)
        lower.set_xlabel(f"confidence: probability of the predicted class (%{stretch})")
    panels[0, 0].set_ylim(top=1.0)
    panels[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.6g}"))
    panels[0, 0].set_ylabel("accuracy (% of photos)")
    panels[1, 0].set_ylabel("photos")
    panels[0, 0].legend(loc="best", fontsize=9)
    return save_png(figure, path)


def _draw_bins(axes: Axes, confidence: NDArray[np.float64], correct: NDArray[np.bool_], lowest: float) -> None:
    bins = equal_mass_bins(confidence)
    identity = _spread(lowest, 200)
    axes.plot(identity, identity, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label="perfectly calibrated")
    means = np.array([confidence[bins == k].mean() for k in np.unique(bins)])
    accuracies = [wilson_interval(int(correct[bins == k].sum()), int((bins == k).sum())) for k in np.unique(bins)]
    value, low, high = (np.array([accuracy[end] for accuracy in accuracies]) for end in ("value", "low", "high"))
    axes.vlines(means, low, high, color=BLUE, alpha=0.35, linewidth=2)
    label = "bins with equal numbers of photos, 95% interval"
    axes.plot(means, value, "o", color=BLUE, markersize=6, label=label, clip_on=False)
    axes.grid()
    axes.set_axisbelow(True)


def _draw_histogram(
    axes: Axes, confidence: NDArray[np.float64], correct: NDArray[np.bool_], lowest: float, *, stretched: bool
) -> None:
    edges = _spread(lowest, HISTOGRAM_BARS + 1) if stretched else np.linspace(lowest, 1.0, HISTOGRAM_BARS + 1)
    groups = [confidence[~correct], confidence[correct]]
    axes.hist(groups, bins=list(edges), stacked=True, color=[ORANGE, BLUE], edgecolor="white", linewidth=0.5)
    axes.margins(y=0.25)
    height = np.full(len(groups[0]), 0.93)  # a few mistakes are invisible in bars scaled for the correct photos
    axes.plot(groups[0], height, "|", color=ORANGE, markersize=9, transform=axes.get_xaxis_transform())
    title = f"{len(groups[0]):,} incorrect (orange, one tick each) and {len(groups[1]):,} correct (blue)"
    axes.set_title(title, fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _stretch(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log10(np.clip(1.0 - confidence, 0.0, None) + MIN_GAP)


def _shrink(stretched: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 + MIN_GAP - 10.0 ** (-stretched)


def _spread(lowest: float, count: int) -> NDArray[np.float64]:
    """Return ``count`` confidences from ``lowest`` to 1, evenly spaced on the stretched axis."""
    low, high = _stretch(np.array([lowest, 1.0]))
    values = _shrink(np.linspace(low, high, count))
    values[[0, -1]] = lowest, 1.0  # exact, so that rounding drops no photo from the histogram
    return values


def _set_confidence_axis(axes: Axes, lowest: float, *, stretched: bool) -> None:
    if stretched:
        axes.set_xscale("function", functions=(_stretch, _shrink))
    ticks = STRETCHED_TICKS if stretched else EVEN_TICKS
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{100 * tick:g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(lowest, 1.0)
