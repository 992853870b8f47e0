"""Which photos are the same, to the byte or to the eye."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from finetune.data.inspection import Scan

HASH_BYTES = 8
MOST_BITS_APART = 3
MOST_LEVELS_APART = 10.0
PAIRS_A_BUCKET = 200


def find_duplicates(scans: Sequence[Scan]) -> list[tuple[Scan, ...]]:
    """Groups of two or more photos that are byte-identical or look the same, in the order of their names.

    Two photos look the same where their perceptual hashes differ in at most 3 of 64 bits and their 16 x 16 thumbnails by
    at most 10 of 255 levels in the mean. A hash that far apart agrees in one of its four 16-bit quarters, so only photos
    that share a quarter are compared.
    """
    readable = [scan for scan in scans if scan.damage is None]
    parent = list(range(len(readable)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, scan in enumerate(readable):
        parent[root(i)] = root(first.setdefault(scan.sha256, i))
    distinct = sorted(first.values())
    prints = np.array([readable[i].fingerprint for i in distinct], dtype=np.uint8).reshape(len(distinct), -1)
    for a, b in _alike(prints):
        parent[root(distinct[a])] = root(distinct[b])
    groups = defaultdict(list)
    for i, scan in enumerate(readable):
        groups[root(i)].append(scan)
    found = [tuple(sorted(group, key=lambda s: s.photo.name)) for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: group[0].photo.name)


def _alike(prints: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs of rows that look the same."""
    for a, b in _candidates(prints):
        bits = int(np.unpackbits(prints[a, :HASH_BYTES] ^ prints[b, :HASH_BYTES]).sum())
        if bits <= MOST_BITS_APART:
            apart = np.abs(prints[a, HASH_BYTES:].astype(np.int16) - prints[b, HASH_BYTES:]).mean()
            if apart <= MOST_LEVELS_APART:
                yield a, b


def _candidates(prints: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose hashes share one of four quarters; in a crowded one each row is paired with its neighbours only."""
    for quarter in range(0, HASH_BYTES, 2):
        buckets = defaultdict(list)
        for i, row in enumerate(prints):
            buckets[row[quarter : quarter + 2].tobytes()].append(i)
        for bucket in buckets.values():
            if len(bucket) <= PAIRS_A_BUCKET:
                yield from combinations(bucket, 2)
            else:
                bucket.sort(key=lambda i: prints[i, :HASH_BYTES].tobytes())
                yield from pairwise(bucket)
