"""Replace the head for new classes, or the first convolution for another number of input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class NormalizedLinear(nn.Linear):
    """A Linear layer that scales each of its input vectors to unit length first."""

    def forward(self, embedding: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(embedding, dim=-1))


def replace_heads(net: nn.Module, heads: Sequence[str], num_classes: int, *, normalize: bool = False) -> None:
    """Replace each head by a new, trainable layer of the same type with ``num_classes`` outputs.

    Args:
        net: The network, modified in place.
        heads: Module names of Linear or Conv2d layers.
        num_classes: The number of outputs.
        normalize: Make the new heads ``NormalizedLinear``.

    Raises:
        TypeError: A head is another type of layer.
    """
    for name in heads:
        old = net.get_submodule(name)
        if isinstance(old, nn.Linear):
            layer = NormalizedLinear if normalize else nn.Linear
            new: nn.Module = layer(old.in_features, num_classes, bias=old.bias is not None)
        elif isinstance(old, nn.Conv2d):
            new = _convolution(old, out_channels=num_classes)
        else:
            raise TypeError(f"The head {name} must be a Linear layer or a convolution, got {type(old).__name__}.")
        net.set_submodule(name, new)


def adapt_in_channels(net: nn.Module, in_channels: int) -> nn.Module:
    """Replace the first convolution if its number of input channels differs, with new weights. Returns ``net``."""
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
