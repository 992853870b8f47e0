"""Summarize a network layer by layer, with the size and parameter formulas of each convolution."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
import torchinfo
from torch import Tensor, nn

from models.networks.classifier import Classifier
from models.networks.flops import build_on_meta, input_shape
from models.networks.hooks import forward_hooks, layer_names
from models.networks.registry import get_spec
from models.networks.spec import ModelSpec
from models.networks.split_point import split_model


@dataclass(frozen=True)
class ConvolutionSummary:
    """One convolution of a network: its settings, and its input and output size (h, w) in pixels."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | None  # None: TensorFlow's "same" padding
    dilation: tuple[int, int]
    groups: int
    bias: bool
    input_px: tuple[int, int]
    output_px: tuple[int, int]

    @property
    def parameters_formula(self) -> str:
        """The number of parameters: (kernel height * kernel width * inputs per output + bias) * outputs."""
        height, width = self.kernel
        inputs = f"{self.in_channels}" if self.groups == 1 else f"{self.in_channels}/{self.groups}"
        count = (height * width * self.in_channels // self.groups + self.bias) * self.out_channels
        return f"({height} * {width} * {inputs}{' + 1' if self.bias else ''}) * {self.out_channels} = {count:,}"

    @property
    def size_formula(self) -> str:
        """The output size: floor((size + 2 * padding - kernel) / stride) + 1, once if height and width are equal."""
        height, width = (self._side(axis) for axis in (0, 1))
        return height if height == width else f"{height} high, {width} wide"

    def _side(self, axis: int) -> str:
        input_px, output_px, stride = self.input_px[axis], self.output_px[axis], self.stride[axis]
        if self.padding is None:
            return f"ceil({input_px} / {stride}) = {output_px}"
        extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return f"floor(({input_px} + 2 * {self.padding[axis]} - {extent}) / {stride}) + 1 = {output_px}"

    def text(self) -> str:
        """Format the convolution with both formulas."""
        kind = f"conv {self.kernel[0]}x{self.kernel[1]}, {self.in_channels} -> {self.out_channels}"
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.name}: {kind}{groups}\n    parameters  {self.parameters_formula}\n    output px   {self.size_formula}"


def trace_convolutions(net: nn.Module, *shape: int) -> list[ConvolutionSummary]:
    """Return the convolutions of a network in execution order for an input of ``shape`` (C, h, w)."""
    convolutions: list[ConvolutionSummary] = []

    def record(name: str, input_: Tensor, output: Tensor) -> None:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        convolutions.append(_convolution(name, layer, input_, output))

    with torch.no_grad(), forward_hooks(net, layer_names(net, nn.Conv2d), record):
        net(torch.zeros(1, *shape, device=next(net.parameters()).device))
    return convolutions


def last_frozen_layer(spec: ModelSpec) -> str | None:
    """Return the last layer that fine-tuning keeps frozen, or None for a network without pretrained weights."""
    if spec.weights is None:
        return None
    net = build_on_meta(spec).requires_grad_(False)
    for head in spec.heads:
        net.get_submodule(head).requires_grad_(True)
    return split_model(Classifier(net, spec.preprocessing)).last_frozen


def summarize_layers(spec: ModelSpec, net: nn.Module) -> torchinfo.ModelStatistics:
    """Summarize all layers with torchinfo for a single image."""
    image = torch.zeros(1, *input_shape(spec), device="meta")
    return torchinfo.summary(
        net,
        input_data=image,
        device="meta",
        depth=20,
        verbose=0,
        col_names=("output_size", "num_params"),
        row_settings=("var_names",),
    )


def format_network(name: str, *, counts: str) -> str:
    """Format the complete summary of a network as text. ``counts`` is its line of parameters and operations."""
    spec = get_spec(name)
    net = build_on_meta(spec)
    preprocessing, weights, last_frozen = spec.preprocessing, spec.weights, last_frozen_layer(spec)
    table = re.split(r"^=+\n", str(summarize_layers(spec, net)), flags=re.MULTILINE)
    convolutions = [convolution.text() for convolution in trace_convolutions(net, *input_shape(spec))]
    about = [
        f"{spec.title}{f' ({spec.year})' if spec.year else ''}, {spec.paper}",
        f"input        {preprocessing.channels} x {preprocessing.input_px} x {preprocessing.input_px} px, center crop of a "
        f"photo resized to {preprocessing.resize_px} px ({preprocessing.interpolation}); mean {_numbers(preprocessing.mean)}, "
        f"standard deviation {_numbers(preprocessing.std)}",
        f"cost         {counts}",
        f"weights      {f'{weights.location}, {weights.license}' if weights else 'none, trained from random weights'}",
        f"frozen       {f'up to {last_frozen}' if last_frozen else 'nothing'}",
        f"head         {' and '.join(spec.heads)}; Grad-CAM on {spec.cam_layer}",
    ]
    title = "Convolutions:" if convolutions else ""
    return "\n".join([*about, "", table[1] + table[2].rstrip(), "", title, *convolutions]).rstrip()


def as_dict(name: str) -> dict[str, Any]:
    """Return the summary as JSON-ready values: ``last_frozen_layer``, ``layers`` and ``convolutions``."""
    spec = get_spec(name)
    net = build_on_meta(spec)
    names = {id(layer): path for path, layer in net.named_modules()}
    rows = [
        {
            "name": names[row.layer_id],
            "type": row.class_name,
            "output": list(row.output_size),
            "parameters": int(row.num_params),
        }
        for row in summarize_layers(spec, net).summary_list
    ]
    convolutions = [
        {**dataclasses.asdict(c), "parameters_formula": c.parameters_formula, "size_formula": c.size_formula}
        for c in trace_convolutions(net, *input_shape(spec))
    ]
    return {"last_frozen_layer": last_frozen_layer(spec), "layers": rows, "convolutions": convolutions}


def _convolution(name: str, layer: nn.Conv2d, input_: Tensor, output: Tensor) -> ConvolutionSummary:
    is_same = isinstance(layer.padding, str) or type(layer).__name__ == "Conv2dSame"
    return ConvolutionSummary(
        name=name,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel=_pair(layer.kernel_size),
        stride=_pair(layer.stride),
        padding=None if is_same else _pair(layer.padding),
        dilation=_pair(layer.dilation),
        groups=layer.groups,
        bias=layer.bias is not None,
        input_px=(input_.shape[2], input_.shape[3]),
        output_px=(output.shape[2], output.shape[3]),
    )


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
