"""Draw single plots, and define their style."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from finetune.metrics.calibration import calibration_error, equal_mass_bins
from models.artifacts.atomic_io import atomic_write
from models.artifacts.statistics import wilson_interval

# Okabe and Ito (2008): distinguishable with any kind of color blindness
BLUE, ORANGE = "#0072B2", "#D55E00"
MAX_DETAILED_CLASSES = 60  # most classes of a confusion matrix with numbers
MAX_PALETTE_COLORS = 2_000  # a plot has up to 1,000, with smoothed edges
INK, FAINT, TILE = "#222222", "#8A8A8A", "#D9D9D9"
# For scripts that matplotlib's own font lacks; used if installed
FALLBACK_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 110,
    "figure.titlesize": 13,
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # class and file names may contain dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextlib.contextmanager
def report_style() -> Iterator[None]:
    """Apply the style and fonts of the report, and restore matplotlib's settings afterward."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    with mpl.rc_context({**STYLE, "font.family": fonts}), warnings.catch_warnings():
        # Names in a script without an installed font show as boxes; one warning per glyph would not help
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def save_png(figure: Figure, path: Path) -> Path:
    """Write ``figure`` as a PNG atomically. The same figure always produces the same bytes.

    A figure without photos has few colors, and takes half the space with a palette.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", pil_kwargs={"compress_level": 1})
    image = Image.open(drawn).convert("RGB")
    if image.getcolors(MAX_PALETTE_COLORS):
        image = image.quantize(256, dither=Image.Dither.NONE)
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG")
    return path


def printable(text: str, max_length: int) -> str:
    """Shorten ``text`` in the middle to ``max_length`` characters, and replace characters that cannot be drawn."""
    clean = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if len(clean) <= max_length:
        return clean
    head = (max_length - 1) // 2
    return f"{clean[:head]}…{clean[len(clean) - (max_length - 1 - head) :]}"


def plot_learning_curves(history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Loss and accuracy of training and validation over the epochs, the epoch of lowest validation loss marked."""
    epochs = [row["epoch"] for row in history]
    best = min(history, key=lambda row: row["valid_loss"])
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    seconds = sum(row["seconds"] for row in history)
    took = f"{seconds / 60.0:.1f} min" if seconds >= 60.0 else f"{seconds:.1f} s"
    number = f"{len(epochs)} epoch{'' if len(epochs) == 1 else 's'}"
    figure.suptitle(f"Learning curves, before calibration: {number} in {took}", x=0.01, ha="left")
    panels = (("loss", "cross-entropy loss (nats)", 1.0), ("accuracy", "accuracy (% of photos)", 100.0))
    for axes, (key, unit, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, name, color, marker in (("train", "training", FAINT, "s"), ("valid", "validation", BLUE, "o")):
            values = [scale * row[f"{split}_{key}"] for row in history]
            axes.plot(epochs, values, color=color, marker=marker, markersize=4, linewidth=1.8, label=name)
        at_best = scale * best[f"valid_{key}"]
        axes.axvline(best["epoch"], color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.plot(
            best["epoch"], at_best, "o", markersize=10, markerfacecolor="none", markeredgecolor=ORANGE,
            markeredgewidth=1.8, linestyle="none", label=f"lowest validation loss (epoch {best['epoch']:g})",
        )  # fmt: skip
        shown = f"{at_best:.4f}" if key == "loss" else f"{at_best:.2f}%"
        title = f"{key.capitalize()}: validation {shown} at epoch {best['epoch']:g}"
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    figure.axes[0].set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return save_png(figure, path)


def plot_more_photos(curve: Mapping[str, Any], path: Path) -> Path:
    """Plot the out-of-fold accuracy and log loss by the number of training images, with the estimate for more of them."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle("What more training photos would bring", x=0.01, ha="left")
    panels = (("accuracy", "accuracy (% of photos)", 100.0), ("log_loss", "log loss (nats)", 1.0))
    for axes, (key, unit, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        values, low, high = (np.array([scale * row[end] for row in curve[key]]) for end in ("value", "low", "high"))
        axes.errorbar(curve["photos"], values, yerr=[values - low, high - values], fmt="o-", color=BLUE, capsize=3)
        gain = {end: scale * curve["gain"][key][end] for end in ("value", "low", "high")}
        digits = 2 if key == "accuracy" else 4
        change = f"{gain['value']:+.{digits}f} ({gain['low']:+.{digits}f} to {gain['high']:+.{digits}f})"
        axes.set(xscale="log", xlabel="training photos (log scale)", ylabel=unit)
        axes.set_title(f"{curve['more_photos']:,} more photos: {change}")
        axes.xaxis.set_major_locator(FixedLocator(curve["photos"]))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{count:,}" for count in curve["photos"]]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    return save_png(figure, path)


def plot_ood_scores(
    scores: NDArray[np.float32], neither_scores: NDArray[np.float32] | None, max_score: float, path: Path
) -> Path:
    """Plot the distribution of the OOD score for images of the classes and of none of them, with its limit."""
    groups = [(scores, "photos of the classes", BLUE)]
    if neither_scores is not None and len(neither_scores):
        groups.append((neither_scores, "photos of none of the classes", ORANGE))
    everything = np.concatenate([values for values, _, _ in groups])
    bins = np.linspace(float(everything.min()), max(float(everything.max()), max_score) + 1e-6, 60)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for values, name, color in groups:
        weights = np.full(len(values), 100.0 / len(values))
        above = int((values > max_score).sum())
        label = f"{name}: {above:,} of {len(values):,} above the limit"
        axes.hist(values, bins=bins.tolist(), weights=weights, color=color, alpha=0.6, label=label)
    axes.axvline(max_score, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(title=f"How unlike the training photos (limit {max_score:.3f})", xlabel="OOD score", ylabel="% of photos")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=9)
    return save_png(figure, path)


def plot_confusion_matrix(counts: NDArray[np.int64], classes: Sequence[str], path: Path) -> Path:
    """Plot the confusion matrix, rows being true classes, with counts and percent of the row.

    Correct predictions are blue and incorrect ones orange, darker for a larger fraction of the row. The size of the figure is
    bounded: beyond 60 classes it has colors without numbers, and names only some of the classes.

    Args:
        counts: Number of images by true and predicted class, (C, C).
        classes: The class names.
        path: The PNG file.
    """
    size = len(classes)
    totals = counts.sum(axis=1, keepdims=True)
    fractions = counts / np.maximum(totals, 1)
    is_detailed = size <= MAX_DETAILED_CLASSES
    cell_in = float(np.clip(7.0 / size, 0.42, 1.5)) if is_detailed else 0.42 * MAX_DETAILED_CLASSES / size
    figure = Figure(figsize=(size * cell_in + 3.0, size * cell_in + 2.2), layout="constrained")
    axes = figure.add_subplot()
    colors = _cell_colors(fractions)
    axes.imshow((255 * colors).round().astype(np.uint8), aspect="equal")
    font_pt = float(np.clip(cell_in * 14, 6.5, 13))
    for row, column in np.argwhere(counts > 0) if is_detailed else ():
        brightness = float(colors[row, column, :3] @ (0.299, 0.587, 0.114))
        text = f"{counts[row, column]:,}\n{100 * fractions[row, column]:.{1 if cell_in > 0.6 else 0}f}%"
        color = INK if brightness > 0.5 else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=font_pt, color=color)
    names = [printable(name, 24) for name in classes]
    horizontal = size <= 4 and max(map(len, names)) <= 12
    label_pt = 11 if size <= 6 else 9
    title_pt = float(np.clip(size * cell_in, 11, 16))
    named = range(0, size, -(-size // MAX_DETAILED_CLASSES))
    axes.set_xticks(named, [names[i] for i in named], rotation=0 if horizontal else 90, fontsize=label_pt)
    axes.set_yticks(named, [f"{names[i]} ({totals[i, 0]:,})" for i in named], fontsize=label_pt)
    if is_detailed:
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class", fontsize=title_pt)
    axes.set_ylabel("true class (number of photos)", fontsize=title_pt)
    mistakes = int(counts.sum() - counts.trace())
    caption = "photos, and % of the true class" if is_detailed else "the darker, the larger the fraction of the true class"
    title = f"Confusion matrix: {mistakes:,} of {counts.sum():,} photos incorrect\n{caption}"
    axes.set_title(title, fontsize=title_pt)
    return save_png(figure, path)


def _cell_colors(fractions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map fractions (C, C) to RGBA colors (C, C, 4). The square root makes one mistake in 200 visible."""
    colors = mpl.colormaps["Oranges"](0.9 * np.sqrt(fractions))
    diagonal = np.arange(len(fractions))
    colors[diagonal, diagonal] = mpl.colormaps["Blues"](0.15 + 0.7 * fractions[diagonal, diagonal])
    colors[fractions == 0] = mpl.colors.to_rgba("#F6F6F6")
    return np.asarray(colors)


MAX_THRESHOLD_PANELS = 9  # all photos, and the classes with the most mistakes


def plot_thresholds(labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: Sequence[str], path: Path) -> Path:
    """Plot precision, recall and the photos without a label over the minimum probability, for all classes and for single ones.

    Beyond eight classes only the ones with the most mistakes have a panel.

    Args:
        labels: True classes, (N,).
        probabilities: Predicted probabilities, (N, C).
        classes: The class names.
        path: The PNG file.
    """
    predicted, confidence = probabilities.argmax(axis=1), np.minimum(probabilities.max(axis=1), 1.0)
    correct = predicted == labels
    panels = [("All classes", np.ones(len(labels), dtype=bool), len(labels))]
    mistakes = np.bincount(labels[~correct], minlength=len(classes)) + np.bincount(predicted[~correct], minlength=len(classes))
    for label in sorted(np.argsort(-mistakes, kind="stable")[: MAX_THRESHOLD_PANELS - 1]):
        own = predicted == label
        if own.any():
            panels.append((f"Predicted as {printable(classes[label], 24)}", own, int((labels == label).sum())))
    stretched = float(np.median(confidence)) > CROWDED
    ticks = STRETCHED_TICKS if stretched else EVEN_TICKS
    lowest = max(tick for tick in ticks[:-1] if tick <= float(confidence.min()))
    thresholds = _spread(lowest, 300) if stretched else np.linspace(lowest, 1.0, 300)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows + 0.6), layout="constrained")
    figure.suptitle("What a minimum probability gives and costs", x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (title, own, support) in zip(grid, panels, strict=False):
        order = np.argsort(confidence[own])
        kept = len(order) - np.searchsorted(confidence[own][order], thresholds)
        right = np.concatenate([np.cumsum(correct[own][order][::-1])[::-1], [0]])[len(order) - kept]
        some = kept > 0
        axes.plot(thresholds[some], right[some] / kept[some], color=BLUE, linewidth=1.8, label="precision")
        if support:
            axes.plot(thresholds, right / support, color=INK, linewidth=1.4, linestyle=(0, (1, 1)), label="recall")
        axes.plot(
            thresholds, 1 - kept / len(order), color=ORANGE, linewidth=1.6, linestyle=(0, (5, 2)), label="without a label"
        )
        axes.set_title(f"{title} ({len(order):,} photos)")
        axes.grid()
        _set_confidence_axis(axes, lowest, stretched=stretched)
        axes.tick_params(axis="x", rotation=45 if stretched else 0)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.6g}"))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(f"minimum probability (%{', stretched toward 100' if stretched else ''})", fontsize=10)
    figure.supylabel("% of photos", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=9)
    return save_png(figure, path)


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
