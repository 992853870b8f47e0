"""Fit the OOD score and its limit, and measure how well it recognizes images of none of the classes.

``models.artifacts.ood_score`` describes the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import QUANTILES_95
from finetune.metrics.classification import roc_auc
from finetune.metrics.formatting import format_percent
from finetune.metrics.groups import effective_size, proportion_interval
from models.artifacts.ood_score import OODParameters
from models.artifacts.statistics import wilson_interval

MAX_COMPONENTS = 64
MAX_IMAGES = 5000  # sample for the covariance, to bound time and memory
# Sum over all directions. The graph computes the distance in the other directions as a difference of float32 numbers of up to
# 2, with an error of about 5e-7, which a smaller variance would magnify. Classes that are easy to tell apart have one.
MIN_OTHER_VARIANCE = 2e-3
# With less, as in a network after a few steps from random weights, the score would measure the rounding of the embeddings.
MIN_TOTAL_VARIANCE = 1e-6
FOLDS = 10
RESAMPLES = 1000
CHUNK_ROWS = 1024  # bounds the memory


class Rows(Protocol):
    """Embeddings of N images. Indexing copies some of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: NDArray[np.intp], /) -> NDArray[np.floating[Any]]: ...


class StackedRows:
    """The rows of several arrays (N, ...) as if they were one array, which would take their memory again."""

    def __init__(self, *arrays: NDArray[np.floating[Any]]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(rows) for rows in arrays])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: NDArray[np.intp], /) -> NDArray[np.floating[Any]]:
        stacked = np.empty((len(rows), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
        sources = np.searchsorted(self._ends, rows, side="right")
        for source, (array, end) in enumerate(zip(self._arrays, self._ends, strict=True)):
            own = sources == source
            stacked[own] = array[rows[own] - (end - len(array))]
        return stacked


@dataclass(frozen=True)
class OODLimit:
    """The highest score of an image that counts as like the training images.

    Attributes:
        max_score: The limit.
        requested: The requested rate of false alarms.
        expected: The rate that the limit has on average for new images of the same kind.
        low: Lower end of the 95% interval of the rate for new images, in the long run.
        high: Upper end of that interval.
        images: Number of images whose scores gave the limit.
        sample: Number of images of a sample on which the rate may be measured.
        sample_low: Lower end of the 95% interval of the rate in such a sample, which varies more than in the long run.
        sample_high: Upper end of that interval.
        groups: Number of groups of the images, for which the intervals allow; None for independent images.
    """

    max_score: float
    requested: float
    expected: float
    low: float
    high: float
    images: int
    sample: int
    sample_low: float
    sample_high: float
    groups: int | None = None

    @property
    def is_reached(self) -> bool:
        """Whether there were images enough to guarantee the requested rate."""
        return self.expected <= self.requested

    def text(self) -> str:
        """Describe the limit in one or two sentences."""
        expected = f"{self.expected:.2%} of new photos are expected to be false alarms"
        intervals = (
            f"95% interval: {self.low:.2%} to {self.high:.2%} in the long run, {self.sample_low:.2%} to {self.sample_high:.2%} "
            f"in a sample of {self.sample:,}."
        )
        if self.groups is not None:
            intervals += f" The intervals allow for {self.groups:,} groups of photos."
        if self.is_reached:
            return f"{expected}, by the scores of {self.images:,} photos. {intervals}"
        return (
            f"{self.requested:.2%} false alarms cannot be guaranteed with the scores of {self.images:,} photos. With the "
            f"highest of them as the limit, {expected}. {intervals}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OODLimit:
        """Read the result of ``as_dict``, which may have further members."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def fit_ood(embeddings: NDArray[np.floating[Any]], labels: NDArray[np.int64], *, seed: int = 0) -> OODParameters | None:
    """Fit the score to training images.

    The covariance is shrunk toward a multiple of the identity by Ledoit and Wolf's formula (2004,
    https://doi.org/10.1016/S0047-259X(03)00096-4), and its largest principal components are kept.

    Args:
        embeddings: (N, ...).
        labels: (N,) class indices. Classes without images have no mean.
        seed: Selects the images for the covariance if there are more than ``MAX_IMAGES``.

    Returns:
        The parameters, or None if the images do not vary within their classes.
    """
    return _fit_rows(embeddings, np.arange(len(embeddings)), labels, seed=seed)


def _fit_rows(embeddings: Rows, used: NDArray[np.intp], labels: NDArray[np.int64], *, seed: int) -> OODParameters | None:
    """Fit the score to the images ``used``."""
    from sklearn.decomposition import PCA  # imported here because it takes a second

    present, rows = np.unique(labels[used], return_inverse=True)
    means = np.stack([_mean_direction(embeddings, used[rows == row]) for row in range(len(present))])
    selected = np.arange(len(used))
    if len(used) > MAX_IMAGES:
        selected = np.sort(np.random.default_rng(seed).choice(len(used), MAX_IMAGES, replace=False))
    differences = to_unit_length(embeddings[used[selected]]) - means[rows[selected]]
    dimensions = differences.shape[1]
    total = float(squared_lengths(differences).sum() / len(differences))
    if len(used) <= len(present) or not total > MIN_TOTAL_VARIANCE:
        return None
    count = min(MAX_COMPONENTS, dimensions, len(differences) - 1)
    shrinkage = ledoit_wolf_shrinkage(differences)
    pca = PCA(n_components=count, random_state=0, copy=False).fit(differences)  # overwrites them
    largest = pca.explained_variance_ * (len(differences) - 1) / len(differences)
    average = total / dimensions
    others = max(total - float(largest.sum()), 0.0) / (dimensions - count) if dimensions > count else average
    other_variance = max((1 - shrinkage) * others + shrinkage * average, MIN_OTHER_VARIANCE / dimensions)
    center = means.mean(axis=0)
    return OODParameters(
        center=center.astype(np.float32),
        directions=np.concatenate([pca.components_, means - center]).astype(np.float32),
        variances=((1 - shrinkage) * largest + shrinkage * average).astype(np.float32),
        other_variance=np.array(other_variance, np.float32),
    )


def ledoit_wolf_shrinkage(differences: NDArray[np.float64]) -> float:
    """Return how much to shrink the covariance of (N, d) differences from their means: 0 not at all, 1 to the identity.

    This is scikit-learn's estimate for centered data, in a quarter of its time: the sum of all products of squares is a sum
    over images, and only the covariance itself needs a matrix product.
    """
    count, dimensions = differences.shape
    lengths = squared_lengths(differences)
    trace = lengths.sum() / count
    squared_covariances = ((differences.T @ differences) ** 2).sum() / count**2
    noise = ((lengths**2).sum() / count - squared_covariances) / (dimensions * count)
    spread = (squared_covariances - trace**2 / dimensions) / dimensions
    shrunk = min(noise, spread)
    return float(shrunk / spread) if shrunk else 0.0


def squared_lengths(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the squared length of each row, without a copy of all squares: (N, d) -> (N,)."""
    return np.asarray(np.einsum("ij,ij->i", rows, rows))


def _mean_direction(embeddings: Rows, used: NDArray[np.intp]) -> NDArray[np.float64]:
    """Compute the mean of embeddings of unit length, a chunk at a time: (d,)."""
    chunks = (used[i : i + CHUNK_ROWS] for i in range(0, len(used), CHUNK_ROWS))
    return np.asarray(sum(to_unit_length(embeddings[own]).sum(axis=0, dtype=np.float64) for own in chunks) / len(used))


def to_unit_length(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Flatten embeddings and scale them to unit length: (N, ...) -> (N, d)."""
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float32, copy=False)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), np.float32(1e-12))


def assign_groups_to_folds(groups: NDArray[np.int64], *, seed: int = 0) -> NDArray[np.int64]:
    """Assign images to folds at random, all images of a group to the same one: (N,) groups -> (N,) folds."""
    distinct, rows = np.unique(groups, return_inverse=True)
    folds = np.arange(len(distinct)) % FOLDS
    np.random.default_rng(seed).shuffle(folds)
    return folds[rows]


def out_of_fold_scores(
    embeddings: Rows,
    labels: NDArray[np.int64],
    fold_of: NDArray[np.int64],
    *,
    is_training: NDArray[np.bool_],
    seed: int = 0,
) -> NDArray[np.float32] | None:
    """Score every image with parameters that were fit to the training images of the other folds.

    An image is therefore never compared with itself, nor with its duplicates, if they are in the same fold.

    Args:
        embeddings: The embeddings of N training and validation images.
        labels: (N,) class indices.
        fold_of: (N,) the fold of each image.
        is_training: (N,) which images the parameters are fit to.
        seed: See ``fit_ood``.

    Returns:
        (N,) scores, or None if the other folds of some fold do not suffice for a fit.
    """
    scores = np.empty(len(embeddings), np.float32)
    for fold in np.unique(fold_of):
        others, own = (fold_of != fold) & is_training, np.flatnonzero(fold_of == fold)
        parameters = _fit_rows(embeddings, np.flatnonzero(others), labels, seed=seed) if others.any() else None
        if parameters is None:
            return None
        scores[own] = parameters.scores(embeddings[own])
    return scores


def fit_limit(
    scores: NDArray[np.floating[Any]],
    false_alarms: float,
    *,
    sample: int | None = None,
    groups: NDArray[np.int64] | None = None,
) -> OODLimit:
    """Choose the limit for a rate of false alarms: the k-th lowest score with k = (N + 1) (1 - rate), rounded up.

    For new images of the same kind, the rate of scores above the k-th of N is distributed as Beta(N + 1 - k, k), whatever the
    distribution of the scores (split conformal prediction, https://arxiv.org/abs/2107.07511). For images in groups, the
    intervals are those of the effective number of images (see ``finetune.metrics.groups``).

    Args:
        scores: (N,) scores of images that the score was not fit to, at least one.
        false_alarms: The requested rate.
        sample: Number of images on which the rate may be measured. None: N.
        groups: (N,) the number of each image's group. None: the images are independent.
    """
    from scipy.stats import beta, betabinom  # imported here because it takes a second

    count = len(scores)
    rank = min(count, math.ceil((count + 1) * (1 - false_alarms) - 1e-9))
    above = count + 1 - rank
    max_score = float(np.sort(scores)[rank - 1])
    independent = 1.0 if groups is None else effective_size(scores > max_score, groups) / count
    parameters = above * independent, rank * independent
    low, high = beta.ppf(QUANTILES_95, *parameters)
    sample = sample or count
    effective_sample = max(1, round(sample * independent))
    sample_low, sample_high = betabinom.ppf(QUANTILES_95, effective_sample, *parameters) / effective_sample
    return OODLimit(
        max_score=max_score,
        requested=false_alarms,
        expected=above / (count + 1),
        low=float(low),
        high=float(high),
        images=count,
        sample=sample,
        sample_low=float(sample_low),
        sample_high=float(sample_high),
        groups=None if groups is None else len(np.unique(groups)),
    )


def measure_ood(
    in_distribution: NDArray[np.floating[Any]],
    neither: Mapping[str, NDArray[np.floating[Any]]],
    *,
    max_score: float,
    groups: NDArray[np.int64] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Measure how well the score separates images of the classes from images of none of them, if there are any.

    Args:
        in_distribution: (N,) scores of images of the classes.
        neither: Scores of images of none of them, by the folder that the images are in.
        max_score: The limit.
        groups: (N,) the number of the group of each image of the classes. None: the images are independent.
        seed: Seed of the bootstrap.
        resamples: Number of resamples.

    Returns:
        The numbers of images, and the false alarms, the caught images and the AUROC, each with its 95% interval. The last two
        are None without images of none of the classes. Under ``folders`` they are those of each folder.
    """

    def separation(scores: NDArray[np.floating[Any]]) -> dict[str, Any]:
        both = np.concatenate([in_distribution, scores]).astype(np.float64)
        labels = np.repeat([0, 1], [len(in_distribution), len(scores)])
        return {
            "neither_photos": len(scores),
            "caught": wilson_interval(int((scores > max_score).sum()), len(scores)),
            "auroc": roc_auc(labels, np.stack([-both, both], axis=1), seed=seed, resamples=resamples),
        }

    folders = {name: separation(scores) for name, scores in neither.items() if len(scores)}
    total: dict[str, Any] = {"neither_photos": 0, "caught": None, "auroc": None}
    if folders:
        total = next(iter(folders.values())) if len(folders) == 1 else separation(np.concatenate(list(neither.values())))
    return {
        "photos": len(in_distribution),
        "max_score": max_score,
        "false_alarms": proportion_interval(in_distribution > max_score, groups),
        **total,
        "folders": folders,
    }


def format_ood(measured: Mapping[str, Any]) -> str:
    """Format the result of ``measure_ood`` as a short text."""

    def rate(measure: Mapping[str, float], photos: int) -> str:
        return f"{format_percent(measure, 2)}, {round(measure['value'] * photos):,} of {photos:,} photos"

    false_alarms = rate(measured["false_alarms"], measured["photos"])
    lines = [f"false alarms       {false_alarms} of the classes count as unlike the training photos"]
    if auroc := measured["auroc"]:
        caught = rate(measured["caught"], measured["neither_photos"])
        lines += [
            f"none of these      {caught} of none of the classes are caught",
            f"none, ROC AUC      {auroc['value']:.4f} ({auroc['low']:.4f} to {auroc['high']:.4f})",
        ]
    folders = measured.get("folders", {})  # which bundles of earlier versions do not have
    if len(folders) > 1:
        lines += [
            f"  {name}: {rate(own['caught'], own['neither_photos'])} are caught, ROC AUC {own['auroc']['value']:.4f} "
            f"({own['auroc']['low']:.4f} to {own['auroc']['high']:.4f})"
            for name, own in folders.items()
        ]
    return "\n".join(lines)
