"""Every count of a page, out of the cells: totals, facets, the confusion matrix, the histogram of confidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from service.db.filter import FACETS, UNLABELED, Filter
from service.db.schema import UNKNOWN

HISTOGRAM_BINS = 20


class Bucket(NamedTuple):
    """One combination of all that is filtered by, and how many photos have it. Classes are their names."""

    id: int
    source: str
    split: str
    label: str  # UNLABELLED where nobody has said
    predicted: str
    percent: int
    review: str
    duplicate: bool
    mislabeled: bool
    images: int

    @property
    def outcome(self) -> str:
        return "unlabeled" if self.label == UNLABELED else "correct" if self.label == self.predicted else "incorrect"


# What a cell says of each facet: one value, but for flags, of which it can have none or both, and for live photos' split.
_VALUES: dict[str, Callable[[Bucket], tuple[str, ...]]] = {
    "outcome": lambda cell: (cell.outcome,),
    "class": lambda cell: (cell.label,),
    "predicted": lambda cell: (cell.predicted,),
    "source": lambda cell: (cell.source,),
    "split": lambda cell: (cell.split,) * bool(cell.split),
    "review": lambda cell: (cell.review,),
    "flag": lambda cell: ("duplicate",) * cell.duplicate + ("mislabeled",) * cell.mislabeled,
}


@dataclass
class FacetCounts:
    """What a filter lets through, counted. A facet's counts are those under the rest of the filter: what a click would show."""

    total: int = 0
    facets: dict[str, Counter[str]] = field(default_factory=lambda: {parameter: Counter() for parameter in FACETS})
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)  # (true class, predicted class)
    histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)  # by confidence, in steps of 5 %
    bucket_ids: list[int] = field(default_factory=list)  # the ids of those let through


def bucket_from_row(row: Sequence[object], classes: Sequence[str]) -> Bucket:
    """A row of the table, with the classes' names in place of their numbers."""
    id_, source, split, label, predicted, *rest = row
    assert isinstance(label, int)
    assert isinstance(predicted, int)
    name = UNLABELED if label == UNKNOWN else classes[label]
    return Bucket(id_, source, split, name, classes[predicted], *rest)  # type: ignore[arg-type]


def count_buckets(cells: Iterable[Bucket], filters: Filter, *, image_counts: Mapping[int, int] | None = None) -> FacetCounts:
    """Count ``cells`` under ``filters``. Where ``image_counts`` gives photos for a cell's id, those are what there is of it.

    A cell that fails one facet alone still counts for that facet.
    """
    chosen = [(parameter, set(values)) for parameter, field in FACETS.items() if (values := getattr(filters, field))]
    low, high = filters.confidence
    counts = FacetCounts()
    for cell in cells:
        images = cell.images if image_counts is None else image_counts.get(cell.id, 0)
        if not images or not low <= cell.percent < high:
            continue
        failed = [name for name, values in chosen if values.isdisjoint(_VALUES[name](cell))]
        if len(failed) > 1:
            continue
        for parameter, facet in counts.facets.items():
            if not failed or failed == [parameter]:
                for value in _VALUES[parameter](cell):
                    facet[value] += images
        if not failed:
            counts.total += images
            counts.confusion[cell.label, cell.predicted] += images
            counts.histogram[cell.percent * HISTOGRAM_BINS // 100] += images
            counts.bucket_ids.append(cell.id)
    return counts
