"""Accuracy by slice, and the values of columns that make slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune.metrics.slices import compute_slices, format_slices
from models.artifacts.facets import EMPTY, OTHER, Facet, make_facets
from models.artifacts.predictions import Predictions
from models.artifacts.statistics import wilson_interval


def facet(values: list[str]) -> Facet | None:
    return next(iter(make_facets({"column": values})), None)


def order(values: list[str]) -> tuple[str, ...] | None:
    made = facet(values)
    return made and made.order


def test_texts_are_ordered_by_frequency_and_an_empty_value_is_last() -> None:
    made = facet(["", "a", "b", "b", ""])
    assert made
    assert made.values == (EMPTY, "a", "b", "b", EMPTY)
    assert made.order == ("b", "a", EMPTY)


def test_of_many_texts_the_rare_ones_are_one_value() -> None:
    frequent = [f"site {i}" for i in range(20) for _ in range(10)]
    assert order([*frequent, *(f"rare {i}" for i in range(150))]) == (*(f"site {i}" for i in range(20)), OTHER)


def test_columns_that_do_not_divide_the_photos_are_left_out() -> None:
    assert order([f"id {i}" for i in range(100)]) is None
    assert order(["id 1", "id 2", "id 3", ""]) is None
    assert order(["", ""]) is None
    assert len(make_facets({f"column {i}": ["a", "b"] for i in range(30)})) == 20


def test_few_numbers_are_values_in_ascending_order() -> None:
    assert order(["10", "9", "2.5", "9", ""]) == ("2.5", "9", "10", EMPTY)


def test_many_numbers_are_divided_into_ranges_of_about_equal_size() -> None:
    values = [str(number) for number in np.random.default_rng(0).permutation(1000) / 10]
    made = facet([*values, ""])
    assert made
    assert made.order == ("up to 19.9", "over 19.9 to 39.9", "over 39.9 to 59.9", "over 59.9 to 79.9", "over 79.9", EMPTY)
    assert all(made.values.count(name) == pytest.approx(200, abs=3) for name in made.order[:-1])
    assert dict(zip([*values, ""], made.values, strict=True))["19.9"] == "up to 19.9"


@pytest.mark.parametrize("values", [["1", "x"] * 15, ["nan", *map(str, range(15))] * 2, ["inf", *map(str, range(15))] * 2])
def test_a_column_with_other_values_is_not_divided_into_ranges(values: list[str]) -> None:
    made = facet(values)
    assert made
    assert set(made.order) == set(values)


def predictions(correct: np.ndarray[Any, Any], facets: dict[str, list[str]], groups: tuple[str, ...] = ()) -> Predictions:
    probabilities = np.where(correct[:, None], [[0.9, 0.1]], [[0.2, 0.8]])
    names = tuple(f"{i}.jpg" for i in range(len(correct)))
    labels = np.zeros(len(correct), dtype=np.int64)
    columns = {name: tuple(values) for name, values in facets.items()}
    return Predictions(("a", "b"), names, labels, probabilities, names, names, groups=groups, facets=columns)


def test_slices_are_sorted_by_the_upper_end_of_their_interval() -> None:
    correct = np.array([False] + [True] * 60 + [False] * 40 + [True] * 99)
    camera = ["tiny"] + ["bad"] * 100 + ["good"] * 99
    rows = compute_slices(predictions(correct, {"camera": camera}))
    assert [row["value"] for row in rows] == ["bad", "tiny", "good"]
    assert rows[0]["accuracy"] == wilson_interval(60, 100)
    assert (rows[0]["column"], rows[0]["photos"]) == ("camera", 100)
    text = format_slices({"slices": rows, "accuracy": {"value": correct.mean()}})
    assert text.splitlines() == [
        "worst slices   accuracy                      photos",
        "camera = bad   60.0% (50.2 to 69.1%)         100  lower than the rest (p < 0.001)",
        "camera = tiny  0.0% (0.0 to 79.3%)           1",
        "camera = good  100.0% (96.3 to 100.0%)       99",
    ]


def test_chance_differences_of_many_slices_are_not_reported() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(2000) < 0.9
    noise = {f"column {i}": [str(value) for value in rng.integers(0, 10, 2000)] for i in range(15)}
    rows = compute_slices(predictions(correct, noise))
    assert len(rows) == 150
    assert "lower than the rest" not in format_slices({"slices": rows, "accuracy": {"value": correct.mean()}})
    assert format_slices({"slices": rows, "accuracy": {"value": 0.9}}).endswith("... and 140 more slices in metrics.json")


def test_a_slice_of_one_group_is_not_significant() -> None:
    correct = np.array([False] * 20 + [True] * 200)
    place = ["lab"] * 20 + ["field"] * 200
    patients = tuple(f"p{i // 20}" for i in range(220))
    independent = {row["value"]: row for row in compute_slices(predictions(correct, {"place": place}))}
    grouped = {row["value"]: row for row in compute_slices(predictions(correct, {"place": place}, patients))}
    assert independent["lab"]["p"] < 0.001
    assert grouped["lab"]["p"] > 0.05
    assert grouped["lab"]["accuracy"]["high"] > 3 * independent["lab"]["accuracy"]["high"]


def test_a_column_with_one_value_has_no_comparison() -> None:
    (row,) = compute_slices(predictions(np.array([True, False]), {"camera": ["x", "x"]}))
    assert row["p"] is None


def test_without_columns_there_are_no_slices() -> None:
    assert compute_slices(predictions(np.array([True]), {})) == []
    assert format_slices({"accuracy": {"value": 1.0}}) == ""
