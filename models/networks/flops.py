"""Count a network's parameters and its multiply-accumulate operations (MACs) per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.hooks import forward_hooks, layer_names
from models.networks.registry import create_model
from models.networks.spec import Cost, ModelSpec


def count_parameters(net: nn.Module) -> int:
    """Count the network's parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_macs(net: nn.Module, *shape: int) -> int:
    """Count the MACs of the convolutions and Linear layers for one image, as is usual in papers.

    Each output value of such a layer costs as many MACs as one filter has weights. On the meta device nothing is computed.

    Args:
        net: The network.
        shape: The image's shape (C, h, w).
    """
    counts: list[int] = []

    def add(name: str, layer_input: Tensor, layer_output: Tensor) -> None:
        counts.append(layer_output[0].numel() * net.get_submodule(name).get_parameter("weight")[0].numel())

    with torch.no_grad(), forward_hooks(net, layer_names(net, nn.Conv2d, nn.Linear), add):
        net.eval()(torch.zeros(1, *shape, device=next(net.parameters()).device))
    return sum(counts)


def get_cost(spec: ModelSpec) -> Cost:
    """Return the cost recorded in ``spec``, or measure it if none is recorded."""
    return spec.cost or measure_cost(spec)


def measure_cost(spec: ModelSpec) -> Cost:
    """Count the cost of a network without creating its weights."""
    net = build_on_meta(spec)
    return Cost(count_parameters(net), count_macs(net, *input_shape(spec)))


def build_on_meta(spec: ModelSpec) -> nn.Module:
    """Build a network on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return create_model(spec.name).eval()


def input_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Return the shape of the network's input, (C, h, w)."""
    side = spec.preprocessing.input_px
    return spec.preprocessing.channels, side, side
