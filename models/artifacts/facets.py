"""Divide images by the further columns of a table into a bounded number of values per column. Does not import torch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_COLUMNS = 20
MAX_VALUES = 20
MAX_EXACT_NUMBERS = 10  # more different numbers are divided into ranges
RANGES = 5
EMPTY, OTHER = "(empty)", "(other values)"


@dataclass(frozen=True)
class Facet:
    """A column that images can be filtered and compared by.

    Attributes:
        name: Name of the column.
        values: The value or range of each image.
        order: The different values: numbers ascending, text by frequency.
    """

    name: str
    values: tuple[str, ...]
    order: tuple[str, ...]


def make_facets(columns: Mapping[str, Sequence[str]]) -> list[Facet]:
    """Return the columns that divide the images, up to 20 of them.

    A column of more than 10 different numbers is divided into ranges with about equal numbers of images. Of more than 20 texts
    the most frequent 20 remain, and the others are one value. A column is left out if it is empty, or if it is an identifier or
    a note: every image has another text, or 20 texts cover less than half of the images.
    """
    facets = (_make_facet(name, values) for name, values in columns.items())
    return [facet for facet in facets if facet is not None][:MAX_COLUMNS]


def _make_facet(name: str, texts: Sequence[str]) -> Facet | None:
    counts = Counter(text for text in texts if text)
    if not counts:
        return None
    numbers = {text: _number(text) for text in counts}
    if all(number is not None for number in numbers.values()):
        named = _name_numbers({text: number for text, number in numbers.items() if number is not None}, counts)
    elif len(counts) == counts.total() > 2:
        return None
    elif len(counts) > MAX_VALUES:
        frequent = {text: text for text, _ in counts.most_common(MAX_VALUES)}
        if sum(counts[text] for text in frequent) < sum(counts.values()) / 2:
            return None
        named = {**frequent, **{text: OTHER for text in counts if text not in frequent}}
    else:
        named = {text: text for text, _ in counts.most_common()}
    order = [*dict.fromkeys(named.values()), *([EMPTY] if "" in texts else [])]
    return Facet(name, tuple(named[text] if text else EMPTY for text in texts), tuple(order))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _name_numbers(numbers: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, str]:
    """Return the value of each text, in ascending order: the text itself, or its range."""
    ascending = sorted(numbers, key=lambda text: numbers[text])
    if len(set(numbers.values())) <= MAX_EXACT_NUMBERS:
        return {text: text for text in ascending}
    images = np.repeat([numbers[text] for text in ascending], [counts[text] for text in ascending])
    quantiles = np.quantile(images, np.linspace(0, 1, RANGES + 1)[1:-1], method="lower")
    limits = sorted({float(f"{quantile:.3g}") for quantile in quantiles})
    names = [f"up to {limits[0]:g}", *(f"over {a:g} to {b:g}" for a, b in itertools.pairwise(limits))]
    names.append(f"over {limits[-1]:g}")
    return {text: names[int(np.searchsorted(limits, numbers[text], side="left"))] for text in ascending}
