"""The frozen part, run once: the numbers behind the cut for every photo, computed or found on disk."""

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
    """``run(pixels)``: (N, H, W, C) uint8 -> (N, ...) float32, what the network gives behind the cut.

    On a CPU the part is compiled by OpenVINO, which takes a third of eager torch's time for depthwise convolutions; on a
    GPU it is torch's own, in mixed precision and channels last. Either way the batch size is fixed and the last one padded, so
    that a photo's numbers do not depend on which others stand beside it. Where everything is trained, only normalisation is
    left, which needs none of that.
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
    """Features by the sha256 of the photo, for one frozen part, kept on disk."""

    def __init__(self, frozen: FeatureExtractor, store: ArrayStore, *, workers: int = 0) -> None:
        self._frozen = frozen
        self._store = store
        self._workers = workers

    def missing(self, sha256s: Sequence[str]) -> set[str]:
        """Those whose features are not on disk."""
        return set(sha256s) - self._store.load(sha256s).keys()

    def features(self, records: Sequence[ImageRecord], pixel_cache: PixelCache, *, label: str) -> NDArray[np.float32]:
        """The features (N, ...) of readable photos, in order; those not on disk are computed and kept.

        Of several processes each sees to its own photos, keeps their features on its own disk and hands them to the others.
        """
        return distributed.map_rows_sharded(
            records, lambda own: self._own(own, pixel_cache, label), name=lambda record: record.sample.name
        )

    def _own(self, records: Sequence[ImageRecord], pixel_cache: PixelCache, label: str) -> NDArray[np.float32]:
        sha256s = [record.sha256 for record in records]
        rows = self._store.load(sha256s)
        todo = list({record.sha256: record for record in records if record.sha256 not in rows}.values())
        try:
            for record, row in self._compute(todo, pixel_cache, label):
                rows[record.sha256] = row
                self._store.add(record.sha256, row)
        finally:  # also when a person stops the run: what is computed is kept
            self._store.flush()
        return np.stack([rows[sha256] for sha256 in sha256s])

    def _compute(
        self, todo: Sequence[ImageRecord], pixel_cache: PixelCache, label: str
    ) -> Iterator[tuple[ImageRecord, NDArray[np.float32]]]:
        if not todo:
            return
        pixels = threaded_map(lambda record: pixel_cache.pop(record.sha256, record.sample.path), todo, workers=self._workers)
        with tqdm(total=len(todo), desc=label, unit="photo", disable=None) as bar:
            if bar.disable:
                print(f"{label}: {len(todo):,} photos to run", flush=True)
            for batch in batched(zip(todo, pixels, strict=True), GPU_BATCH):
                records, pictures = zip(*batch, strict=True)
                yield from zip(records, self._frozen.run(np.stack(pictures)), strict=True)
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
    """Everything beside the photo that its features depend on."""
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
