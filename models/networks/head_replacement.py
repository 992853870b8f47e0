"""Layers put in the place of others, of the same kind but another width: new classes at the end, other channels in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def replace_heads(net: nn.Module, heads: Sequence[str], num_classes: int) -> None:
    """Put a new, trainable layer of the same kind in each head's place, with ``num_classes`` outputs.

    A head is a Linear layer or a convolution. Raises TypeError for another one.
    """
    for name in heads:
        old = net.get_submodule(name)
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        elif isinstance(old, nn.Conv2d):
            new = _convolution(old, out_channels=num_classes)
        else:
            raise TypeError(f"a head is a Linear layer or a convolution, {name} is {type(old).__name__}")
        net.set_submodule(name, new)


def adapt_in_channels(net: nn.Module, in_channels: int) -> nn.Module:
    """``net``, its first convolution replaced where it takes another number of channels; its weights are new then."""
    name, first = next((name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d))
    if first.in_channels != in_channels:
        net.set_submodule(name, _convolution(first, in_channels=in_channels))
    return net


def _convolution(old: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    settings: dict[str, Any] = {
        "in_channels": old.in_channels,
        "out_channels": old.out_channels,
        "kernel_size": old.kernel_size,
        "stride": old.stride,
        "padding": old.padding,
        "dilation": old.dilation,
        "groups": old.groups,
        "bias": old.bias is not None,
        "padding_mode": old.padding_mode,
    }
    return nn.Conv2d(**settings | changes)
