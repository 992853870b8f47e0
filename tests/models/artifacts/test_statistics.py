"""McNemar's exact test."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from models.artifacts.statistics import mcnemar_p_value


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (5, 0), (3, 3), (2, 9), (9, 2), (40, 61), (700, 820)])
def test_the_p_value_is_that_of_an_exact_binomial_test(only_a: int, only_b: int) -> None:
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=1e-9)


def test_equal_classifiers_do_not_differ() -> None:
    assert mcnemar_p_value(0, 0) == 1.0
