"""What a network costs: parameters, and multiply-accumulates (MACs) for one picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.hooks import forward_hooks, layer_names
from models.networks.registry import create_model
from models.networks.spec import Cost, ModelSpec


def count_parameters(net: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_macs(net: nn.Module, *shape: int) -> int:
    """The multiply-accumulates of one picture of ``shape`` (C, h, w), in convolutions and Linear layers, as papers count them.

    Each number that such a layer gives costs as many as a row of its weights is long. A network on the meta device is counted
    without computing anything.
    """
    counts: list[int] = []

    def add(name: str, given: Tensor, result: Tensor) -> None:
        counts.append(result[0].numel() * net.get_submodule(name).get_parameter("weight")[0].numel())

    with torch.no_grad(), forward_hooks(net, layer_names(net, nn.Conv2d, nn.Linear), add):
        net.eval()(torch.zeros(1, *shape, device=next(net.parameters()).device))
    return sum(counts)


def get_cost(spec: ModelSpec) -> Cost:
    """What ``spec`` records, or what is counted where it records nothing."""
    return spec.cost or measure_cost(spec)


def measure_cost(spec: ModelSpec) -> Cost:
    """The cost of ``spec``'s network, counted on its own architecture without any weights."""
    net = build_on_meta(spec)
    return Cost(count_parameters(net), count_macs(net, *input_shape(spec)))


def build_on_meta(spec: ModelSpec) -> nn.Module:
    """The network of ``spec`` without any numbers, to be counted."""
    with torch.device("meta"):
        return create_model(spec.name).eval()


def input_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """What the network takes: (C, h, w)."""
    side = spec.preprocessing.input_px
    return spec.preprocessing.channels, side, side
