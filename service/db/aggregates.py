"""Compute every count of a page from the buckets: totals, facets, confusion matrix and confidence histogram."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from models.artifacts.label_issues import can_judge_labels
from service.db.filter import FACETS, FLAGS, UNLABELED, Filter
from service.db.records import Bucket

HISTOGRAM_BINS = 20

# A bucket has one value of each facet, except flags (any number of them) and the split of production photos (none).
_VALUES: dict[str, Callable[[Bucket], tuple[str, ...]]] = {
    "outcome": lambda bucket: (bucket.outcome,),
    "class": lambda bucket: (bucket.label,),
    "predicted": lambda bucket: (bucket.predicted,),
    "source": lambda bucket: (bucket.source,),
    "split": lambda bucket: (bucket.split,) * bool(bucket.split),
    "review": lambda bucket: (bucket.review,),
    "flag": lambda bucket: tuple(name for name in FLAGS if getattr(bucket, name)),
}


@dataclass
class FacetCounts:
    """Counts of the photos that match a filter.

    The counts of a facet ignore the filter's own values of that facet: they state what selecting a value would show.
    """

    total: int = 0
    facets: dict[str, Counter[str]] = field(default_factory=lambda: {parameter: Counter() for parameter in FACETS})
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)  # (label, predicted class)
    histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)  # by confidence, in steps of 5%
    bucket_ids: list[int] = field(default_factory=list)  # of the matching buckets

    @property
    def can_judge_labels(self) -> bool:
        """Whether the model is good enough on the labeled photos to question their labels."""
        counts = {key: images for key, images in self.confusion.items() if key[0] != UNLABELED}
        classes = sorted({name for key in counts for name in key})
        matrix = np.array([[counts.get((label, predicted), 0) for predicted in classes] for label in classes], dtype=np.int64)
        return can_judge_labels(matrix.reshape(len(classes), len(classes)))


def count_buckets(buckets: Iterable[Bucket], filters: Filter, *, image_counts: Mapping[int, int] | None = None) -> FacetCounts:
    """Count the buckets that match a filter.

    Args:
        buckets: All buckets of a model.
        filters: The filter. A bucket that fails one facet alone still counts for that facet.
        image_counts: The number of photos by bucket id, if not all photos of the buckets count.
    """
    selected = [(parameter, set(values)) for parameter, field in FACETS.items() if (values := getattr(filters, field))]
    low, high = filters.confidence
    counts = FacetCounts()
    for bucket in buckets:
        images = bucket.images if image_counts is None else image_counts.get(bucket.id, 0)
        if not images or not low <= bucket.percent < high:
            continue
        failed = [name for name, values in selected if values.isdisjoint(_VALUES[name](bucket))]
        if len(failed) > 1:
            continue
        for parameter, facet in counts.facets.items():
            if not failed or failed == [parameter]:
                for value in _VALUES[parameter](bucket):
                    facet[value] += images
        if not failed:
            counts.total += images
            counts.confusion[bucket.label, bucket.predicted] += images
            counts.histogram[bucket.percent * HISTOGRAM_BINS // 100] += images
            counts.bucket_ids.append(bucket.id)
    return counts
