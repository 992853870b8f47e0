"""Compute the outputs of the frozen layers (features) once per image and cache them on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import PIL.features
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from finetune.compute import distributed
from finetune.compute.device import Compute
from finetune.data.inspection import ImageRecord, PixelCache
from finetune.io.array_store import ArrayStore
from finetune.io.threaded_map import batched, engine_threads, threaded_map
from models.networks.batchnorm_fusion import fuse_batchnorm
from models.networks.onnx_export import export_onnx
from models.networks.split_point import SplitModel
from models.preprocess import Preprocessing
from models.runtime.openvino_engine import OpenVINOEngine, load_openvino

CPU_BATCH, GPU_BATCH = 8, 64


class FeatureExtractor:
    """Runs the frozen layers of a network.

    On a CPU they are compiled by OpenVINO, which takes a third of the time of eager torch for depthwise convolutions. On a GPU
    they run in torch, in mixed precision and channels last. The batch size is fixed and the last batch padded, so features do
    not depend on the other images of a batch. If all layers are trained, only the normalization remains, which runs in torch.
    """

    def __init__(self, split_model: SplitModel, preprocessing: Preprocessing, compute: Compute) -> None:
        self._split_model = split_model
        self._preprocessing = preprocessing
        self._compute = compute

    @property
    def engine(self) -> str:
        on_cpu = self._compute.device.type == "cpu"
        return f"openvino {load_openvino().__version__}" if on_cpu else f"torch {torch.__version__} {self._compute.device.type}"

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute features (N, ...) float32 of pixels (N, H, W, C) uint8."""
        if self._split_model.last_frozen == "normalize":
            with torch.inference_mode():
                return self._split_model.frozen.cpu()(torch.from_numpy(pixels)).numpy()
        if self._compute.device.type == "cpu":
            return self._compiled.run(pixels)[0]
        return np.concatenate([self._run_torch(pixels[i : i + GPU_BATCH]) for i in range(0, len(pixels), GPU_BATCH)])

    @cached_property
    def _compiled(self) -> OpenVINOEngine:
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            graph = Path(folder) / "frozen.onnx"
            export_onnx(
                fuse_batchnorm(self._split_model.frozen),
                preprocessing=self._preprocessing,
                outputs=["features"],
                path=graph,
                batch_size=CPU_BATCH,
            )
            return OpenVINOEngine(graph, outputs=["features"], precision=self._compute.precision, threads=engine_threads())

    def _run_torch(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        padded = np.zeros((GPU_BATCH, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        device = self._compute.device
        frozen = self._split_model.frozen.to(device).to(memory_format=torch.channels_last)
        with torch.inference_mode(), self._compute.autocast():
            features = frozen(torch.from_numpy(padded).to(device))
        return features[: len(pixels)].float().cpu().numpy()


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
