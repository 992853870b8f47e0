"""Which of several classifiers is better on the same photos, and whether the difference is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class PairwiseComparison:
    """Two classifiers: how many photos only the one and only the other has right, and Holm's p of that being chance."""

    better: str
    worse: str
    only_better: int
    only_worse: int
    p: float

    @property
    def is_significant(self) -> bool:
        return self.p < SIGNIFICANCE_LEVEL

    def text(self) -> str:
        counts = f"{self.only_better} photos that only it has right, against {self.only_worse}"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        if self.is_significant:
            return f"{self.better} is better than {self.worse}: {counts} ({p})."
        counts = f"{self.only_better} photos that only the first has right, against {self.only_worse}"
        return f"No difference is shown between {self.better} and {self.worse}: {counts} ({p})."


def compare_pairs(correct: Mapping[str, NDArray[np.bool_]]) -> list[PairwiseComparison]:
    """Every pair, by McNemar's exact test on the photos (N,) that one of the two has right (McNemar 1947).

    The p values are corrected for the number of pairs (Holm 1979). The clearest differences come first.
    """
    found = []
    for a, b in combinations(correct, 2):
        only_a, only_b = int((correct[a] & ~correct[b]).sum()), int((correct[b] & ~correct[a]).sum())
        if only_b > only_a:
            a, b, only_a, only_b = b, a, only_b, only_a
        p = float(binomtest(only_b, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
        found.append(PairwiseComparison(a, b, only_a, only_b, p))
    found.sort(key=lambda pair: (pair.p, pair.only_worse - pair.only_better))
    corrected = holm_correction([pair.p for pair in found])
    return [
        PairwiseComparison(x.better, x.worse, x.only_better, x.only_worse, p) for x, p in zip(found, corrected, strict=True)
    ]


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values that come in rising order."""
    corrected, highest = [], 0.0
    for rank, p in enumerate(p_values):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected.append(highest)
    return corrected
