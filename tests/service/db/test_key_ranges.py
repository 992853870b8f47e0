"""service.db.key_ranges: an order cut where nothing of a filter is, on ranges drawn at random and on names."""

from __future__ import annotations

import itertools
import random

from service.db.key_ranges import merge_ranges


def test_every_cell_is_in_one_segment_that_covers_it_and_none_touches_another() -> None:
    rng = random.Random(1)
    seen = set()
    for bucket_ids in range(40):
        lows = [rng.randrange(60) for _ in range(bucket_ids)]
        ranges = [(low, low + rng.randrange(4), rng.randrange(1, 9), id_) for id_, low in enumerate(lows)]
        segments = merge_ranges(ranges)
        assert sorted(id_ for segment in segments for id_ in segment.bucket_ids) == list(range(bucket_ids))
        for segment in segments:
            own = [ranges[id_] for id_ in segment.bucket_ids]
            assert segment.low == min(low for low, _, _, _ in own)
            assert segment.high == max(high for _, high, _, _ in own)
            assert segment.count == sum(count for _, _, count, _ in own)
        assert all(one.high < next_.low for one, next_ in itertools.pairwise(segments))
        seen.add(len(segments))
    assert len(seen) > 5


def test_folders_lie_apart() -> None:
    ranges = [
        ("valid/dogs/1", "valid/dogs/9", 3, 1),
        ("train/cats/1", "train/cats/9", 4, 2),
        ("train/cats/2", "train/cats/7", 5, 3),
    ]
    assert [(segment.low, segment.count, segment.bucket_ids) for segment in merge_ranges(ranges)] == [
        ("train/cats/1", 9, [2, 3]),
        ("valid/dogs/1", 3, [1]),
    ]
