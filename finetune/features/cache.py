"""Compute features once per image and cache them on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import PIL.features
from numpy.typing import NDArray
from tqdm import tqdm

from finetune.compute import distributed
from finetune.data.inspection import ImageRecord, PixelCache
from finetune.features.extractor import GPU_BATCH, FeatureExtractor
from finetune.io.array_store import ArrayStore
from finetune.io.threaded_map import batched, threaded_map
from models.preprocess import Preprocessing


class FeatureCache:
    """A disk cache of features by the sha256 of the image, for one set of frozen layers."""

    def __init__(self, frozen: FeatureExtractor, store: ArrayStore, *, workers: int = 0) -> None:
        self._frozen = frozen
        self._store = store
        self._workers = workers

    def missing(self, sha256s: Sequence[str]) -> set[str]:
        """Return the images whose features are not on disk."""
        return set(sha256s) - self._store.load(sha256s).keys()

    def features(self, records: Sequence[ImageRecord], pixel_cache: PixelCache, *, label: str) -> NDArray[np.float32]:
        """Return the features (N, ...) of readable images, in order. Compute and cache the ones that are not on disk.

        In distributed training each process computes and caches its own shard and sends it to the others.
        """
        return distributed.map_rows_sharded(
            records, lambda own: self._shard_features(own, pixel_cache, label), name=lambda record: record.sample.name
        )

    def _shard_features(self, records: Sequence[ImageRecord], pixel_cache: PixelCache, label: str) -> NDArray[np.float32]:
        sha256s = [record.sha256 for record in records]
        rows = self._store.load(sha256s)
        missing = list({record.sha256: record for record in records if record.sha256 not in rows}.values())
        try:
            for record, row in self._compute(missing, pixel_cache, label):
                rows[record.sha256] = row
                self._store.add(record.sha256, row)
        finally:  # also on an interrupt, to keep the features computed so far
            self._store.flush()
        return np.stack([rows[sha256] for sha256 in sha256s])

    def _compute(
        self, missing: Sequence[ImageRecord], pixel_cache: PixelCache, label: str
    ) -> Iterator[tuple[ImageRecord, NDArray[np.float32]]]:
        if not missing:
            return
        self._frozen.compile()
        pixels = threaded_map(lambda record: pixel_cache.pop(record.sha256, record.sample.path), missing, workers=self._workers)
        with tqdm(total=len(missing), desc=label, unit="photo", disable=None) as bar:
            if bar.disable:
                print(f"{label}: {len(missing):,} photos to compute", flush=True)
            for batch in batched(zip(missing, pixels, strict=True), GPU_BATCH):
                records, images = zip(*batch, strict=True)
                yield from zip(records, self._frozen.run(np.stack(images)), strict=True)
                bar.update(len(batch))


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
        "pillow": PIL.__version__,
        "jpeg": PIL.features.version("jpg"),
    }
