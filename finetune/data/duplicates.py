"""Find exact and near duplicates among images, and the images that must stay in one split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune.data.image_folder import Dataset, move_to_train
from finetune.data.inspection import APPEARANCE_BYTES, ImageRecord

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
    first: dict[str, int] = {}
    pairs = [(i, first.setdefault(record.sha256, i)) for i, record in enumerate(readable)]
    distinct = sorted(first.values())
    prints = np.array([readable[i].fingerprint for i in distinct], dtype=np.uint8).reshape(len(distinct), -1)
    prints = prints[:, :APPEARANCE_BYTES]
    pairs += [(distinct[a], distinct[b]) for a, b in _near_duplicates(prints)]
    groups = _collect(readable, connect(pairs, len(readable)))
    duplicates = [tuple(sorted(group, key=lambda s: s.sample.name)) for group in groups]
    return sorted(duplicates, key=lambda group: group[0].sample.name)


def find_linked(records: Sequence[ImageRecord]) -> NDArray[np.int64]:
    """Number the sets of images that belong into one split or fold: near duplicates, and the images of one ``group``.

    The relation is transitive: a near duplicate of an image of a group belongs to the group.

    Returns:
        The number of each record's set, (N,).
    """
    row_of = {id(record): row for row, record in enumerate(records)}
    pairs = [(row_of[id(record)], row_of[id(group[0])]) for group in find_duplicates(records) for record in group]
    first: dict[str, int] = {}
    pairs += [(i, first.setdefault(s.sample.group, i)) for i, s in enumerate(records) if s.sample.group]
    return connect(pairs, len(records))


def move_linked_to_train(dataset: Dataset, records: Sequence[ImageRecord]) -> tuple[Dataset, list[ImageRecord]]:
    """Move held-out images to training if they are linked with training images (see ``find_linked``).

    Does nothing if the data folder has a validation split of its own.
    """
    if not dataset.split_from_train:
        return dataset, list(records)
    across = [group for group in _collect(records, find_linked(records)) if len({s.sample.split for s in group}) > 1]
    dataset = move_to_train(dataset, (s.sample.name for group in across for s in group))
    return dataset, [replace(s, sample=sample) for s, sample in zip(records, dataset.samples, strict=True)]


def connect(pairs: Iterable[tuple[int, int]], count: int) -> NDArray[np.int64]:
    """Number the connected components of a graph with ``count`` nodes: (count,)."""
    from scipy.sparse import coo_array  # imported here because many commands do not need it
    from scipy.sparse.csgraph import connected_components

    if not count:
        return np.zeros(0, dtype=np.int64)
    edges = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    _, numbers = connected_components(graph, directed=False)
    return np.asarray(numbers, dtype=np.int64)


def _collect(records: Sequence[ImageRecord], numbers: NDArray[np.int64]) -> list[list[ImageRecord]]:
    """Return the sets of two or more records with the same number."""
    groups = defaultdict(list)
    for record, number in zip(records, numbers.tolist(), strict=True):
        groups[number].append(record)
    return [group for group in groups.values() if len(group) > 1]


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
