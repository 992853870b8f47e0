"""Quantize ONNX graphs with NNCF in a process of its own: ``python nncf_process.py``.

NNCF replaces Python's logger class, prints its progress, and needs several times the memory of the graph. This file imports
nothing else of the project.

The process reads jobs from standard input and writes their results to standard output, as lines of JSON. A job has the
arguments of ``quantize``; its result is the ``problem``, or null. NNCF is imported before the first job.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx

HEAD_INPUT = "embedding"  # the output of the graph that the last layer reads


def quantize(graph: Path, pixels: Path, out: Path, *, careful: bool) -> None:
    """Write a graph with int8 layers (QuantizeLinear, DequantizeLinear) up to the head, which stays in float32.

    The resampling of pixels before the first convolution stays in float32 as well.

    Args:
        graph: The serving graph.
        pixels: The file of photos to choose the ranges of the activations from, (N, H, W, C) uint8.
        out: The file to write.
        careful: Leave the first convolution and the depthwise ones in float32, which usually lose most.
    """
    import nncf

    model, images = onnx.load(graph), np.load(pixels)
    ignored = input_nodes(model) + head_nodes(model) + (sensitive_nodes(model) if careful else [])
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images, lambda image: {model.graph.input[0].name: image[None]}),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=ignored),
    )
    onnx.save(quantized, out)


def input_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the multiplications before the first convolution: joined networks resample their pixels by them.

    In int8, the pixels lose accuracy, and OpenVINO compiles the graph differently from time to time.
    """
    if not any(node.op_type == "Conv" for node in model.graph.node):
        return []
    behind: set[str] = set()
    names = []
    for node in model.graph.node:  # in the order of computation
        if node.op_type == "Conv" or behind & set(node.input):
            behind |= set(node.output)
        elif node.op_type == "MatMul":
            names.append(node.name)
    return names


def head_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of all nodes that are computed from the embedding: the head, softmax and the OOD score."""
    reached = {HEAD_INPUT}
    for node in model.graph.node:  # an embedding may be exported as a copy of the value that the head reads
        if HEAD_INPUT in node.output and node.op_type == "Identity":
            reached.add(node.input[0])
    names = []
    for node in model.graph.node:  # in the order of computation
        if reached & set(node.input):
            reached |= set(node.output)
            names.append(node.name)
    return names


def sensitive_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the first convolution and of the depthwise ones, whose inputs are one channel per group."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    depthwise = [node for node in convolutions if len(node.input) > 1 and shapes.get(node.input[1], [0, 0])[1] == 1]
    return list(dict.fromkeys(node.name for node in (*convolutions[:1], *depthwise)))


def main() -> None:
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # NNCF prints its progress
    # NNCF imports PyTorch and OpenVINO to see whether a model is one of theirs, which takes seconds and 470 MB, and sends usage
    # reports.
    for absent in ("torch", "openvino", "openvino_telemetry"):
        sys.modules[absent] = None  # type: ignore[assignment]
    import nncf  # noqa: F401  (takes a second)

    for line in sys.stdin:
        job = json.loads(line)
        problem = None
        try:
            quantize(Path(job["graph"]), Path(job["pixels"]), Path(job["out"]), careful=job["careful"])
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps({"problem": problem}), file=results)


if __name__ == "__main__":
    main()
