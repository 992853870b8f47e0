"""Run an ONNX graph on a CPU with OpenVINO. No torch.

The same engine serves photos, extracts frozen features while training and checks an exported bundle, so that what was
evaluated is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def supports_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, so that it is worth its rounding."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OnnxEngine:
    """A compiled ONNX graph: ``run(pixels)`` gives one array for each of ``outputs``, and nothing else is computed.

    A graph with a fixed batch size gets its last, smaller batch padded, so that a photo is computed in the same way
    wherever it stands. ``threads`` 0 means all processors that the process may use.
    """

    def __init__(self, graph: Path | bytes, *, outputs: Sequence[str], precision: str = "fp32", threads: int = 0) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(graph) if isinstance(graph, Path) else graph)
        model = openvino.Model([model.output(name) for name in outputs], model.get_parameters(), "photos")
        batch = model.input(0).get_partial_shape()[0]
        self._batch = batch.get_length() if batch.is_static else None
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """(N, H, W, C) uint8 -> one float32 array (N, ...) for each of the outputs asked for."""
        if self._batch is None:
            return self._infer(pixels)
        parts = [self._infer_padded(pixels[i : i + self._batch]) for i in range(0, len(pixels), self._batch)]
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def _infer_padded(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        assert self._batch is not None
        missing = self._batch - len(pixels)
        padded = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)]) if missing else pixels
        return [rows[: len(pixels)] for rows in self._infer(padded)]

    def _infer(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        results = self._request.infer([pixels])
        return [np.array(results[i]) for i in range(len(results))]  # a copy: the request's own memory is used again
