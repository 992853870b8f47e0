"""What a network costs: parameters, and multiply-accumulates (MACs) for one picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.registry import create_model
from models.spec import ModelSpec


def parameters(net: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(parameter.numel() for parameter in net.parameters())


def macs(net: nn.Module, *shape: int) -> int:
    """The multiply-accumulates of one picture of ``shape`` (C, h, w), in convolutions and Linear layers, as papers count them.

    Each number that such a layer gives costs as many as a row of its weights is long. A network on the meta device is counted
    without computing anything.
    """
    counts: list[int] = []

    def count(layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        counts.append(result[0].numel() * layer.get_parameter("weight")[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net.eval()(torch.zeros(1, *shape, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def empty(spec: ModelSpec) -> nn.Module:
    """The network of ``spec`` without any numbers, to be counted."""
    with torch.device("meta"):
        return create_model(spec.name).eval()


def picture_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """What the network takes: (C, h, w)."""
    side = spec.preprocessing.input_px
    return spec.preprocessing.channels, side, side
