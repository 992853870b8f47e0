"""The bound on the accuracy that a lower precision loses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from finetune.metrics.equivalence import images_needed, max_accuracy_lost, paired_counts


def score(lost: float, only_reference: int, only_other: int, total: int) -> float:
    """The score statistic of a difference, with the other parameter at its most likely value on a grid."""
    rates = np.linspace(1e-9, (1 - lost) / 2 - 1e-9, 2_000_001)  # of the images that only the other network gets right
    likelihood = (
        only_reference * np.log(rates + lost)
        + only_other * np.log(rates)
        + (total - only_reference - only_other) * np.log(1 - 2 * rates - lost)
    )
    rate = rates[likelihood.argmax()]
    return (only_reference - only_other - total * lost) / np.sqrt(total * (2 * rate + lost * (1 - lost)))


@pytest.mark.parametrize(
    ("only_reference", "only_other", "total"),
    [(0, 0, 400), (1, 0, 400), (0, 2, 2000), (3, 1, 400), (12, 10, 1000), (8, 30, 500)],
)
def test_the_score_of_the_bound_is_the_critical_value(only_reference: int, only_other: int, total: int) -> None:
    bound = max_accuracy_lost(only_reference, only_other, total)
    if bound < 1e-9:  # more was gained than could be lost by chance
        assert score(1e-9, only_reference, only_other, total) < -1.645
    else:
        assert score(bound, only_reference, only_other, total) == pytest.approx(-stats.norm.ppf(0.95), abs=2e-3)


def test_agreement_on_few_images_shows_little() -> None:
    assert max_accuracy_lost(0, 0, 400) == pytest.approx(0.00672, abs=1e-5)
    assert max_accuracy_lost(0, 0, images_needed(0.01)) <= 0.01 < max_accuracy_lost(0, 0, images_needed(0.01) - 1)
    assert images_needed(0.01) == 268
    assert max_accuracy_lost(5, 0, 5) == 1


def test_a_network_at_the_limit_passes_in_about_5_percent_of_samples() -> None:
    total, limit = 1000, 0.01
    passes = 0.0
    for worse in range(40):
        for better in range(15):
            if max_accuracy_lost(worse, better, total) <= limit:
                passes += stats.multinomial.pmf([worse, better, total - worse - better], total, [0.012, 0.002, 0.986])
    assert 0.03 < passes < 0.07


def test_images_of_a_group_count_as_one() -> None:
    reference = np.array([True, True, True, True, False, True])
    other = np.array([False, False, True, True, True, False])
    assert paired_counts(reference, other) == (3, 1, 6)
    assert paired_counts(reference, other, np.array([7, 7, 7, 2, 3, 3])) == (1, 0, 3)
