"""Test that a network in a lower precision is as accurate as in float32: a bound on the accuracy lost, on the same images."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Z_ONE_SIDED_95 = 1.6448536269514722


def paired_counts(
    reference: NDArray[np.bool_], other: NDArray[np.bool_], groups: NDArray[np.int64] | None = None
) -> tuple[int, int, int]:
    """Count the images that only one of two networks classifies correctly.

    Images of one group are not independent, so a group counts as one image: for the network that is correct on more of it.

    Args:
        reference: Whether the reference network classifies each image correctly, (N,).
        other: Whether the other one does, (N,).
        groups: The number of each image's group, (N,).

    Returns:
        The numbers that only the reference and only the other one classifies correctly, and the number of all.
    """
    gained = other.astype(np.int64) - reference
    if groups is not None:
        gained = np.bincount(np.unique(groups, return_inverse=True)[1], weights=gained)
    return int((gained < 0).sum()), int((gained > 0).sum()), len(gained)


def max_accuracy_lost(only_reference: int, only_other: int, total: int) -> float:
    """Compute the upper bound of the one-sided 95% score interval of the accuracy lost.

    The accuracy lost is the accuracy of the reference minus that of the other network. The interval is that of Tango (1998,
    https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B), which has a width even if both
    networks agree on every image.

    Args:
        only_reference: Number of images that only the reference classifies correctly.
        only_other: Number of images that only the other network classifies correctly.
        total: Number of all images.
    """
    difference, different = only_reference - only_other, only_reference + only_other

    def excess(lost: float) -> float:
        """Return how far the score statistic of ``lost`` is above its critical value."""
        linear = different + (difference - 2 * total) * lost
        root = math.sqrt(linear**2 + 8 * total * only_other * lost * (1 - lost))
        only_other_rate = (linear + root) / (4 * total)  # the most likely one if ``lost`` is true
        variance = total * (2 * only_other_rate + lost * (1 - lost))
        return difference - total * lost + Z_ONE_SIDED_95 * math.sqrt(max(variance, 0.0))

    smallest = max(difference / total, 1e-12)
    return float(brentq(excess, smallest, 1.0)) if excess(smallest) > 0 else smallest


def images_needed(limit: float) -> int:
    """Return how many images are needed to show that at most ``limit`` of the accuracy is lost, if both networks agree."""
    return math.ceil(Z_ONE_SIDED_95**2 * (1 - limit) / limit)
