"""Run an ONNX graph on a CPU with OpenVINO. No torch.

The same engine serves photos, extracts frozen features while training and checks an exported bundle, so that what was
evaluated is what is served.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}

Pixels = NDArray[np.uint8]
Arrays = list[NDArray[np.float32]]


class Engine(Protocol):
    """What serves: (N, H, W, C) uint8 pixels -> one float32 array (N, ...) for each output; from several threads at once."""

    def run(self, pixels: Pixels) -> Arrays: ...


def load_openvino() -> ModuleType:
    """Import OpenVINO without its model converter, which at import forks a process that reports to its makers' statistics.

    It is needed for nothing here, and OpenVINO does without where it is missing. The import takes half the time.
    """
    converter = "openvino.tools.ovc"
    blocked = "openvino" not in sys.modules and converter not in sys.modules
    if blocked:
        sys.modules[converter] = None  # type: ignore[assignment]  # how Python is told that a module is not there
    try:
        return importlib.import_module("openvino")
    finally:
        if blocked:
            del sys.modules[converter]


def supports_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, so that it is worth its rounding."""
    return "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOEngine:
    """A compiled ONNX graph: ``run(pixels)`` gives one array for each of ``outputs``, and nothing else is computed.

    ``batch_sizes`` are the only ones that are computed: a batch is split into the largest and its rest padded to the next,
    as every further size costs its own time and memory at its first use. None named, every size is. A graph with a fixed
    batch size has that one. ``threads`` 0 means all processors that the process may use; ``streams`` batches are computed
    at once, each by its share of the threads, when as many threads call ``run``. Threads are not tied to processors, which
    others use as well: who decodes, who talks to clients, another process that computes.

    In the folder ``cache_dir`` OpenVINO keeps what it compiled, under the graph's and the settings' hash: the next start
    takes a quarter of the time.
    """

    def __init__(
        self,
        graph: Path | bytes,
        *,
        outputs: Sequence[str],
        precision: str = "fp32",
        threads: int = 0,
        streams: int = 1,
        batch_sizes: Sequence[int] = (),
        cache_dir: Path | None = None,
    ) -> None:
        openvino = load_openvino()
        core = openvino.Core()
        model = core.read_model(str(graph) if isinstance(graph, Path) else graph)
        model = openvino.Model([model.output(name) for name in outputs], model.get_parameters(), "photos")
        batch = model.input(0).get_partial_shape()[0]
        self.batch_sizes = tuple(sorted(batch_sizes)) if batch.is_dynamic else (batch.get_length(),)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if streams > 1:
            settings = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "NUM_STREAMS": streams}
        settings["ENABLE_CPU_PINNING"] = False
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._tensor, self._outputs = openvino.Tensor, len(outputs)
        self.compiled_model = _compile(core, model, settings, cache_dir)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(self.compiled_model.create_infer_request())

    def run(self, pixels: Pixels) -> Arrays:
        """(N, H, W, C) uint8 -> one float32 array (N, ...) for each of the outputs asked for."""
        if not self.batch_sizes:
            return self._infer(pixels)
        most = self.batch_sizes[-1]
        parts = [self._infer_padded(pixels[i : i + most]) for i in range(0, len(pixels), most)]
        return parts[0] if len(parts) == 1 else [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def _infer_padded(self, pixels: Pixels) -> Arrays:
        missing = next(size for size in self.batch_sizes if size >= len(pixels)) - len(pixels)
        if not missing:
            return self._infer(pixels)
        padded = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)])
        return [rows[: len(pixels)] for rows in self._infer(padded)]

    def _infer(self, pixels: Pixels) -> Arrays:
        request = self._requests.get()
        try:
            # Tensors are set and read one by one: the request's own way with arrays takes as long as a small network.
            request.set_input_tensor(self._tensor(np.require(pixels, requirements=["C", "W"]), shared_memory=True))
            request.start_async()
            request.wait()
            return [request.get_output_tensor(i).data.copy() for i in range(self._outputs)]
        finally:
            self._requests.put(request)


def _compile(core: Any, model: Any, settings: Mapping[str, Any], cache_dir: Path | None) -> Any:
    if cache_dir is not None:
        with contextlib.suppress(RuntimeError):  # a kept file that is damaged, half-written or of another machine
            return core.compile_model(model, "CPU", {**settings, "CACHE_DIR": str(cache_dir)})
    return core.compile_model(model, "CPU", settings)
