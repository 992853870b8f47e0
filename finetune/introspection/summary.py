"""One network, layer by layer, with the arithmetic of each convolution worked out, to be read beside a lecture."""

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
    """One convolution of a network: its settings, the map (h, w) that it is given and the one that it gives, in pixels."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | None  # None: TensorFlow's "same", as much as it takes
    dilation: tuple[int, int]
    groups: int
    bias: bool
    input_px: tuple[int, int]
    output_px: tuple[int, int]

    @property
    def parameters_formula(self) -> str:
        """(kernel height * width * inputs that an output sees + its bias) * outputs, worked out."""
        height, width = self.kernel
        inputs = f"{self.in_channels}" if self.groups == 1 else f"{self.in_channels}/{self.groups}"
        count = (height * width * self.in_channels // self.groups + self.bias) * self.out_channels
        return f"({height} * {width} * {inputs}{' + 1' if self.bias else ''}) * {self.out_channels} = {count:,}"

    @property
    def size_formula(self) -> str:
        """floor((size + 2 * padding - kernel) / stride) + 1, worked out: once where height and width are alike."""
        height, width = (self._side(axis) for axis in (0, 1))
        return height if height == width else f"{height} high, {width} wide"

    def _side(self, axis: int) -> str:
        given, gives, stride = self.input_px[axis], self.output_px[axis], self.stride[axis]
        if self.padding is None:
            return f"ceil({given} / {stride}) = {gives}"
        spread = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return f"floor(({given} + 2 * {self.padding[axis]} - {spread}) / {stride}) + 1 = {gives}"

    def text(self) -> str:
        kind = f"conv {self.kernel[0]}x{self.kernel[1]}, {self.in_channels} -> {self.out_channels}"
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.name}: {kind}{groups}\n    parameters  {self.parameters_formula}\n    output px   {self.size_formula}"


def trace_convolutions(net: nn.Module, *shape: int) -> list[ConvolutionSummary]:
    """The convolutions of a network in the order in which they run on a picture of ``shape`` (C, h, w)."""
    found: list[ConvolutionSummary] = []

    def look(name: str, given: Tensor, result: Tensor) -> None:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        found.append(_convolution(name, layer, given, result))

    with torch.no_grad(), forward_hooks(net, layer_names(net, nn.Conv2d), look):
        net(torch.zeros(1, *shape, device=next(net.parameters()).device))
    return found


def last_frozen_layer(spec: ModelSpec) -> str | None:
    """The last layer that fine-tuning leaves as it is, or None for a network that is trained from random weights."""
    if spec.weights is None:
        return None
    net = build_on_meta(spec).requires_grad_(False)
    for head in spec.heads:
        net.get_submodule(head).requires_grad_(True)
    return split_model(Classifier(net, spec.preprocessing)).last_frozen


def summarize_layers(spec: ModelSpec, net: nn.Module) -> torchinfo.ModelStatistics:
    """torchinfo's account of all layers, for one picture."""
    picture = torch.zeros(1, *input_shape(spec), device="meta")
    return torchinfo.summary(
        net,
        input_data=picture,
        device="meta",
        depth=20,
        verbose=0,
        col_names=("output_size", "num_params"),
        row_settings=("var_names",),
    )


def format_network(name: str, *, counts: str) -> str:
    """All of it, for a person."""
    spec = get_spec(name)
    net = build_on_meta(spec)
    wanted, weights, last_frozen = spec.preprocessing, spec.weights, last_frozen_layer(spec)
    table = re.split(r"^=+\n", str(summarize_layers(spec, net)), flags=re.MULTILINE)
    worked = [convolution.text() for convolution in trace_convolutions(net, *input_shape(spec))]
    about = [
        f"{spec.title}{f' ({spec.year})' if spec.year else ''}, {spec.paper}",
        f"input        {wanted.channels} x {wanted.input_px} x {wanted.input_px} px, the middle of a photo resized to "
        f"{wanted.resize_px} px ({wanted.interpolation}); mean {_numbers(wanted.mean)}, deviation {_numbers(wanted.std)}",
        f"cost         {counts}",
        f"weights      {f'{weights.location}, {weights.license}' if weights else 'none: it is trained from random ones'}",
        f"frozen       {f'up to {last_frozen}' if last_frozen else 'nothing'}",
        f"head         {' and '.join(spec.heads)}; Grad-CAM on {spec.cam_layer}",
    ]
    title = "Convolutions, worked out:" if worked else ""
    return "\n".join([*about, "", table[1] + table[2].rstrip(), "", title, *worked]).rstrip()


def as_dict(name: str) -> dict[str, Any]:
    """The same for a program: ``layers`` and ``convolutions``."""
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
    found = trace_convolutions(net, *input_shape(spec))
    worked = [
        {**dataclasses.asdict(c), "parameters_formula": c.parameters_formula, "size_formula": c.size_formula} for c in found
    ]
    return {"last_frozen_layer": last_frozen_layer(spec), "layers": rows, "convolutions": worked}


def _convolution(name: str, layer: nn.Conv2d, given: Tensor, result: Tensor) -> ConvolutionSummary:
    padded = isinstance(layer.padding, str) or type(layer).__name__ == "Conv2dSame"
    return ConvolutionSummary(
        name=name,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel=_pair(layer.kernel_size),
        stride=_pair(layer.stride),
        padding=None if padded else _pair(layer.padding),
        dilation=_pair(layer.dilation),
        groups=layer.groups,
        bias=layer.bias is not None,
        input_px=(given.shape[2], given.shape[3]),
        output_px=(result.shape[2], result.shape[3]),
    )


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
