"""Ranges of sort keys that have photos of a filter."""

from __future__ import annotations

import itertools
import random

from service.db.pagination import merge_ranges


def test_every_bucket_is_in_one_range_that_covers_it_and_no_ranges_touch() -> None:
    rng = random.Random(1)
    counts = set()
    for bucket_ids in range(40):
        lows = [rng.randrange(60) for _ in range(bucket_ids)]
        ranges = [(low, low + rng.randrange(4), rng.randrange(1, 9), id_) for id_, low in enumerate(lows)]
        merged = merge_ranges(ranges)
        assert sorted(id_ for range_ in merged for id_ in range_.bucket_ids) == list(range(bucket_ids))
        for range_ in merged:
            own = [ranges[id_] for id_ in range_.bucket_ids]
            assert range_.low == min(low for low, _, _, _ in own)
            assert range_.high == max(high for _, high, _, _ in own)
            assert range_.count == sum(count for _, _, count, _ in own)
        assert all(one.high < next_.low for one, next_ in itertools.pairwise(merged))
        counts.add(len(merged))
    assert len(counts) > 5


def test_folders_have_separate_ranges() -> None:
    ranges = [
        ("valid/dogs/1", "valid/dogs/9", 3, 1),
        ("train/cats/1", "train/cats/9", 4, 2),
        ("train/cats/2", "train/cats/7", 5, 3),
    ]
    assert [(range_.low, range_.count, range_.bucket_ids) for range_ in merge_ranges(ranges)] == [
        ("train/cats/1", 9, [2, 3]),
        ("valid/dogs/1", 3, [1]),
    ]
