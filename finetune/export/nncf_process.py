"""Quantize an ONNX graph with NNCF: ``python nncf_process.py IN.onnx PIXELS.npy OUT.onnx [--careful]``.

NNCF replaces Python's logger class, prints its progress, and needs several times the memory of the graph, so it runs in a
process of its own. This file imports nothing else of the project.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

HEAD_INPUT = "embedding"  # the output of the graph that the last layer reads


def quantize(graph: Path, pixels: NDArray[np.uint8], out: Path, *, careful: bool) -> None:
    """Write ``graph`` with int8 layers (QuantizeLinear, DequantizeLinear) up to the head, which stays in float32.

    Args:
        graph: The serving graph.
        pixels: Photos to choose the ranges of the activations from, (N, H, W, C) uint8.
        out: The file to write.
        careful: Leave the first convolution and the depthwise ones in float32, which usually lose most.
    """
    model = onnx.load(graph)
    import nncf  # takes seconds

    ignored = head_nodes(model) + (sensitive_nodes(model) if careful else [])
    quantized = nncf.quantize(
        model,
        nncf.Dataset(pixels, lambda image: {model.graph.input[0].name: image[None]}),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pixels),
        ignored_scope=nncf.IgnoredScope(names=ignored),
    )
    onnx.save(quantized, out)


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


if __name__ == "__main__":
    for absent in ("openvino_telemetry", "torch"):  # NNCF then sends no usage reports, and does not take 470 MB for PyTorch
        sys.modules[absent] = None  # type: ignore[assignment]
    parser = argparse.ArgumentParser()
    parser.add_argument("graph", type=Path)
    parser.add_argument("pixels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--careful", action="store_true")
    args = parser.parse_args()
    quantize(args.graph, np.load(args.pixels), args.out, careful=args.careful)
