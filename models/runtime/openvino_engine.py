"""OpenVINO engine that runs an ONNX graph on the CPU, without torch.

Serving, feature extraction during training and the verification of an exported bundle all use this engine, so the served
results equal the evaluated ones.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# What the layers of a graph in float32 are computed in. Those in int8 stay so.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}

Pixels = NDArray[np.uint8]
Arrays = list[NDArray[np.float32]]


class Engine(Protocol):
    """Thread-safe inference: maps (N, H, W, C) uint8 pixels to one float32 array (N, ...) per output."""

    def run(self, pixels: Pixels) -> Arrays: ...


def load_openvino() -> ModuleType:
    """Import OpenVINO without its model converter, which forks a telemetry process on import.

    The converter is not needed here, and OpenVINO treats it as optional. The import takes half the time without it.
    """
    converter = "openvino.tools.ovc"
    blocked = "openvino" not in sys.modules and converter not in sys.modules
    if blocked:
        sys.modules[converter] = None  # type: ignore[assignment]  # None makes the import fail
    try:
        return importlib.import_module("openvino")
    finally:
        if blocked:
            del sys.modules[converter]


def supports_bf16() -> bool:
    """Return whether this processor supports bfloat16 in hardware."""
    return "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOEngine:
    """A compiled ONNX graph that computes only the requested outputs.

    Threads are not pinned to processors, which decoding, HTTP handling and other processes use as well.

    Args:
        graph: The ONNX file, or its bytes.
        outputs: Names of the graph's outputs to compute.
        precision: A key of ``PRECISIONS``.
        threads: The number of threads; 0 uses all processors available to the process.
        streams: The number of batches computed concurrently, of several threads that call ``run`` or of one large batch. They
            share the threads.
        batch_sizes: The batch sizes to compute; empty allows all. Each new size costs time and memory on its first use, so a
            batch is split into chunks of the largest size, and the rest is padded to the next size. Ignored for a graph
            with a fixed batch size.
        cache_dir: Folder for compiled graphs, keyed by graph and settings. A cached graph loads in a quarter of the time.
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
        self._tensor, self._outputs, self._streams = openvino.Tensor, len(outputs), streams
        self.compiled_model = _compile(core, model, settings, cache_dir)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(self.compiled_model.create_infer_request())

    def run(self, pixels: Pixels) -> Arrays:
        """Run the graph on (N, H, W, C) uint8 pixels. Returns one float32 array (N, ...) per requested output."""
        if not self.batch_sizes:
            return self._infer(pixels)
        max_size = self.batch_sizes[-1]
        if len(pixels) <= max_size:
            return [rows[: len(pixels)] for rows in self._infer(self._pad(pixels))]
        batches = [self._pad(pixels[i : i + max_size]) for i in range(0, len(pixels), max_size)]
        if self._streams == 1:
            chunks = [self._infer(batch) for batch in batches]
        else:
            with ThreadPoolExecutor(self._streams) as pool:
                chunks = list(pool.map(self._infer, batches))
        return [np.concatenate(rows)[: len(pixels)] for rows in zip(*chunks, strict=True)]

    def _pad(self, pixels: Pixels) -> Pixels:
        """Append empty images up to the next batch size."""
        missing = next(size for size in self.batch_sizes if size >= len(pixels)) - len(pixels)
        return np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)]) if missing else pixels

    def _infer(self, pixels: Pixels) -> Arrays:
        request = self._requests.get()
        try:
            # Passing tensors directly avoids the overhead of infer(), which is as slow as a small network.
            request.set_input_tensor(self._tensor(np.require(pixels, requirements=["C", "W"]), shared_memory=True))
            request.start_async()
            request.wait()
            return [request.get_output_tensor(i).data.copy() for i in range(self._outputs)]
        finally:
            self._requests.put(request)


def time_output(graph: Path, output: str, *, start: str, batch_size: int, rounds: int = 50) -> float:
    """Measure how long a graph takes from one output to another that is computed from it.

    Args:
        graph: The ONNX file.
        output: The output to compute.
        start: The output that it is computed from, (N, d).
        batch_size: Images per batch.
        rounds: Number of batches. The fastest counts.

    Returns:
        Seconds per image.
    """
    openvino = load_openvino()
    core = openvino.Core()
    model = core.read_model(str(graph))
    source = model.output(start).get_node().input_value(0)
    parameter = openvino.opset13.parameter(source.get_partial_shape(), np.float32)
    for target in source.get_target_inputs():
        target.replace_source_output(parameter.output(0))
    tail = openvino.Model([model.output(output)], [parameter], "tail")
    compiled = core.compile_model(tail, "CPU", {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False})
    request = compiled.create_infer_request()
    shape = [dimension.get_length() for dimension in list(source.get_partial_shape())[1:]]
    values = np.random.default_rng(0).random((batch_size, *shape), np.float32)
    durations = []
    for _ in range(rounds):
        started = time.perf_counter()
        request.infer([values])
        durations.append(time.perf_counter() - started)
    return min(durations) / batch_size


def _compile(core: Any, model: Any, settings: Mapping[str, Any], cache_dir: Path | None) -> Any:
    if cache_dir is not None:
        with contextlib.suppress(RuntimeError):  # a cached file may be damaged, incomplete or from another machine
            return core.compile_model(model, "CPU", {**settings, "CACHE_DIR": str(cache_dir)})
    return core.compile_model(model, "CPU", settings)
