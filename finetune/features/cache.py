"""Compute features once per image and cache them on disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from finetune.compute import distributed
from finetune.data.inspection import BatchingConsumer, ImageRecord, read_pixels
from finetune.features.extractor import GPU_BATCH, FeatureExtractor
from finetune.io.array_store import ArrayStore
from finetune.io.progress import ImageCounter
from finetune.io.threaded_map import batched, threaded_map
from models.preprocess import Preprocessing, decoder_versions


class FeatureCache(BatchingConsumer):
    """A disk cache of features by the sha256 of the image, for one set of frozen layers.

    It computes features while the images are inspected, so that each file is read and decoded once.
    """

    def __init__(self, frozen: FeatureExtractor, store: ArrayStore, *, workers: int = 0) -> None:
        super().__init__(GPU_BATCH)
        self._frozen = frozen
        self._store = store
        self._workers = workers
        store.index()

    def has_result(self, sha256: str) -> bool:
        """Return whether the features of an image are cached."""
        return sha256 in self._store

    def process(self, sha256s: Sequence[str], pixels: NDArray[np.uint8]) -> None:
        """Compute and cache the features of a batch."""
        self._frozen.compile()
        for sha256, row in zip(sha256s, self._frozen.run(pixels), strict=True):
            self._store.add(sha256, row)

    def flush(self) -> None:
        """Write the computed features to disk."""
        self._store.flush()

    def features(self, records: Sequence[ImageRecord], preprocessing: Preprocessing, *, label: str) -> NDArray[np.float32]:
        """Return the features (N, ...) of inspected images, in order. Compute and cache the ones that are not on disk.

        The array is in a file that the system can move out of memory.

        In distributed training each process computes and caches its own shard and sends it to the others.
        """
        return distributed.map_rows_sharded(
            records, lambda own: self._shard_features(own, preprocessing, label), name=lambda record: record.sample.name
        )

    def _shard_features(self, records: Sequence[ImageRecord], preprocessing: Preprocessing, label: str) -> NDArray[np.float32]:
        positions = defaultdict(list)
        for position, record in enumerate(records):
            positions[record.sha256].append(position)
        features: NDArray[np.float32] = np.empty(0, np.float32)
        missing = {record.sha256: record for record in records}
        for sha256, row in self._store.rows(positions):
            if not len(features):
                features = self._store.scratch((len(records), *row.shape))
            features[positions[sha256]] = row
            del missing[sha256]
        try:
            for record, row in self._compute(list(missing.values()), preprocessing, label):
                if not len(features):
                    features = self._store.scratch((len(records), *row.shape))
                features[positions[record.sha256]] = row
                self._store.add(record.sha256, row)
        finally:  # also on an interrupt, to keep the features computed so far
            self._store.flush()
        return features

    def _compute(
        self, missing: Sequence[ImageRecord], preprocessing: Preprocessing, label: str
    ) -> Iterator[tuple[ImageRecord, NDArray[np.float32]]]:
        if not missing:
            return
        self._frozen.compile()
        pixels = threaded_map(lambda record: read_pixels(record, preprocessing), missing, workers=self._workers)
        counter = ImageCounter("features", len(missing))
        with tqdm(total=len(missing), desc=label, unit="photo", disable=None) as bar:
            if bar.disable:
                print(f"{label}: {len(missing):,} photos to compute", flush=True)
            for batch in batched(zip(missing, pixels, strict=True), GPU_BATCH):
                records, images = zip(*batch, strict=True)
                yield from zip(records, self._frozen.run(np.stack(images)), strict=True)
                bar.update(len(batch))
                counter.add(len(batch))


def cache_context(
    *,
    backbone: str,
    weights_sha256: str,
    preprocessing: Preprocessing,
    last_frozen: str,
    precision: str,
    engine: str,
    permute_pixels: int | None = None,
) -> dict[str, Any]:
    """Return everything that features depend on besides the image."""
    permuted = {} if permute_pixels is None else {"permute_pixels": permute_pixels}
    return permuted | {
        "what": "features",
        "backbone": backbone,
        "weights": weights_sha256,
        "preprocessing": preprocessing.sha256(),
        "last_frozen": last_frozen,
        "precision": precision,
        "engine": engine,
        **decoder_versions(),
    }
