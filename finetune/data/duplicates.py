"""Find exact and near duplicates among images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune.data.image_folder import Dataset, move_to_train
from finetune.data.inspection import ImageRecord

HASH_BYTES = 8
MAX_HASH_DISTANCE = 3
MAX_MEAN_DIFFERENCE = 10.0
MAX_BUCKET_SIZE = 200
CHUNK = 4096


def find_duplicates(records: Sequence[ImageRecord]) -> list[tuple[ImageRecord, ...]]:
    """Group exact and near duplicates.

    Two images are near duplicates if their perceptual hashes differ in at most 3 of 64 bits and their 16 x 16 thumbnails by
    at most 10 of 255 levels on average. Two hashes that differ in at most 3 bits agree in at least one of their four 16-bit
    quarters, so only images that share a quarter are compared.

    Returns:
        Groups of two or more images, sorted by name.
    """
    readable = [record for record in records if record.error is None]
    parent = list(range(len(readable)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, record in enumerate(readable):
        parent[root(i)] = root(first.setdefault(record.sha256, i))
    distinct = sorted(first.values())
    prints = np.array([readable[i].fingerprint for i in distinct], dtype=np.uint8).reshape(len(distinct), -1)
    for a, b in _near_duplicates(prints):
        parent[root(distinct[a])] = root(distinct[b])
    groups = defaultdict(list)
    for i, record in enumerate(readable):
        groups[root(i)].append(record)
    duplicates = [tuple(sorted(group, key=lambda s: s.sample.name)) for group in groups.values() if len(group) > 1]
    return sorted(duplicates, key=lambda group: group[0].sample.name)


def move_duplicates_to_train(dataset: Dataset, records: Sequence[ImageRecord]) -> tuple[Dataset, list[ImageRecord]]:
    """Move held-out images that are near duplicates of training images to training.

    Does nothing if the data folder has a validation folder of its own.
    """
    if not dataset.split_from_train:
        return dataset, list(records)
    across = [group for group in find_duplicates(records) if len({s.sample.split for s in group}) > 1]
    dataset = move_to_train(dataset, (s.sample.name for group in across for s in group))
    return dataset, [replace(s, sample=sample) for s, sample in zip(records, dataset.samples, strict=True)]


def _near_duplicates(prints: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows that are near duplicates."""
    for a, b in _candidates(np.ascontiguousarray(prints[:, :HASH_BYTES])):
        for i in range(0, len(a), CHUNK):
            first, second = (prints[rows[i : i + CHUNK], HASH_BYTES:].astype(np.int16) for rows in (a, b))
            near = np.abs(first - second).mean(axis=1) <= MAX_MEAN_DIFFERENCE
            yield from zip(a[i : i + CHUNK][near].tolist(), b[i : i + CHUNK][near].tolist(), strict=True)


def _candidates(hashes: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield arrays of pairs of rows that share a quarter of their hash and differ in few bits.

    Rows are sorted by a quarter, and each is compared with the next, the second next and so on in its bucket. In large buckets
    rows are compared with the next only.
    """
    whole = hashes.view(">u8")[:, 0]
    for quarter in hashes.view(">u2").T:
        order = np.lexsort((whole, quarter))
        bucket = quarter[order]
        _, sizes = np.unique(bucket, return_counts=True)
        is_small = np.repeat(sizes, sizes) <= MAX_BUCKET_SIZE
        for offset in range(1, min(MAX_BUCKET_SIZE, len(order))):
            pairs = bucket[offset:] == bucket[:-offset]
            if offset > 1:
                pairs &= is_small[offset:]
            if not pairs.any():
                break
            a, b = order[:-offset][pairs], order[offset:][pairs]
            near = np.unpackbits(hashes[a] ^ hashes[b], axis=1).sum(axis=1) <= MAX_HASH_DISTANCE
            yield a[near], b[near]
