"""Pairwise significance tests of classifiers evaluated on the same images (McNemar, Holm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import resample_batches
from models.artifacts.statistics import mcnemar_p_value

SIGNIFICANCE_LEVEL = 0.05
SIGN_FLIPS = 10_000


@dataclass(frozen=True)
class PairwiseComparison:
    """The comparison of two classifiers.

    Attributes:
        better: The classifier with more correct predictions.
        worse: The other one.
        only_better: Number of images that only ``better`` classifies correctly.
        only_worse: Number of images that only ``worse`` classifies correctly.
        p: The p value of McNemar's exact test after Holm's correction.
    """

    better: str
    worse: str
    only_better: int
    only_worse: int
    p: float

    @property
    def is_significant(self) -> bool:
        return self.p < SIGNIFICANCE_LEVEL

    def text(self) -> str:
        """Describe the comparison in one sentence."""
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        counts = f"photos that only one gets right: {self.better} {self.only_better}, {self.worse} {self.only_worse}"
        if self.is_significant:
            return f"{self.better} is better than {self.worse} ({p}; {counts})."
        return f"No significant difference between {self.better} and {self.worse} ({p}; {counts})."


def compare_pairs(
    correct: Mapping[str, NDArray[np.bool_]], *, groups: NDArray[np.int64] | None = None
) -> list[PairwiseComparison]:
    """Compare every pair of classifiers by McNemar's exact test (McNemar 1947), corrected for the number of pairs (Holm 1979).

    Args:
        correct: For each classifier, whether each of the same images is classified correctly, (N,).
        groups: The number of each image's group, (N,). If set, the test is ``sign_flip_p_value``.

    Returns:
        The comparisons, smallest p value first.
    """
    pairs = []
    for a, b in combinations(correct, 2):
        only_a, only_b = int((correct[a] & ~correct[b]).sum()), int((correct[b] & ~correct[a]).sum())
        if only_b > only_a:
            a, b, only_a, only_b = b, a, only_b, only_a
        p = mcnemar_p_value(only_a, only_b) if groups is None else sign_flip_p_value(correct[a], correct[b], groups)
        pairs.append(PairwiseComparison(a, b, only_a, only_b, p))
    pairs.sort(key=lambda pair: (pair.p, pair.only_worse - pair.only_better))
    corrected = holm_correction([pair.p for pair in pairs])
    return [
        PairwiseComparison(x.better, x.worse, x.only_better, x.only_worse, p) for x, p in zip(pairs, corrected, strict=True)
    ]


def sign_flip_p_value(a: NDArray[np.bool_], b: NDArray[np.bool_], groups: NDArray[np.int64]) -> float:
    """Test whether two classifiers are equally accurate on images in groups, for which McNemar's test would be too confident.

    If neither is better, the difference of the numbers of correct images of each group is as often positive as negative. The
    p value is the fraction of 10,000 random choices of the signs with a difference at least as large as the observed one.

    Args:
        a: Whether each image is classified correctly by the first, (N,).
        b: Whether each image is classified correctly by the second, (N,).
        groups: The number of each image's group, (N,).
    """
    _, rows = np.unique(groups, return_inverse=True)
    differences = np.bincount(rows, weights=a.astype(np.float64) - b)
    differences = differences[differences != 0]
    rng = np.random.default_rng(0)
    extreme = 0
    for size in resample_batches(max(1, len(differences)), SIGN_FLIPS):
        flipped = rng.choice((-1.0, 1.0), size=(size, len(differences))) @ differences
        extreme += int((np.abs(flipped) >= abs(differences.sum())).sum())
    return (extreme + 1) / (SIGN_FLIPS + 1)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction to p values in ascending order."""
    corrected, highest = [], 0.0
    for rank, p in enumerate(p_values):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected.append(highest)
    return corrected
