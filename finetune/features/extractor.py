"""Compute the outputs of the frozen layers (features)."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.compute.device import Compute
from finetune.io.progress import step
from finetune.io.threaded_map import available_cpus, engine_threads
from models.networks.batchnorm_fusion import fuse_batchnorm
from models.networks.onnx_export import export_onnx
from models.networks.split_point import SplitModel
from models.preprocess import Preprocessing
from models.runtime.allocator import return_free_memory
from models.runtime.openvino_engine import OpenVINOEngine, load_openvino

CPU_BATCH, GPU_BATCH = 4, 64
CPU_STREAMS = 2  # batches at a time, each on half of the processors: threads wait for each other less than in one batch


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
        if self._compute.device.type == "cpu":
            return f"openvino {load_openvino().__version__}, batch {CPU_BATCH}"
        return f"torch {torch.__version__} {self._compute.device.type}"

    def compile(self) -> None:
        """Compile the layers ahead of the first image, as it takes seconds. Later calls do nothing."""
        if (
            self._compute.device.type == "cpu"
            and self._split_model.last_frozen != "normalize"
            and "_compiled" not in vars(self)
        ):
            with step("Compiling the frozen layers"):
                _ = self._compiled

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute features (N, ...) float32 of pixels (N, H, W, C) uint8."""
        if self._split_model.last_frozen == "normalize":
            with torch.inference_mode():
                return self._split_model.frozen.cpu()(torch.from_numpy(pixels)).numpy()
        if self._compute.device.type == "cpu":
            return self._compiled.run(pixels)[0]
        return np.concatenate([self._run_torch(pixels[i : i + GPU_BATCH]) for i in range(0, len(pixels), GPU_BATCH)])

    def release(self) -> None:
        """Free the compiled layers. They are compiled again if they are needed."""
        vars(self).pop("_compiled", None)
        return_free_memory()  # also that of the decoded images

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
            return OpenVINOEngine(
                graph,
                outputs=["features"],
                precision=self._compute.precision,
                threads=engine_threads(),
                streams=min(CPU_STREAMS, available_cpus()),
            )

    def _run_torch(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        padded = np.zeros((GPU_BATCH, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        device = self._compute.device
        frozen = self._split_model.frozen.to(device).to(memory_format=torch.channels_last)
        with torch.inference_mode(), self._compute.autocast():
            features = frozen(torch.from_numpy(padded).to(device))
        return features[: len(pixels)].float().cpu().numpy()
