"""Forward hooks that observe the inputs and outputs of a network's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

LayerHook = Callable[[str, Any, Any], None]


@contextlib.contextmanager
def forward_hooks(net: nn.Module, names: Iterable[str], hook: LayerHook) -> Iterator[None]:
    """Register a forward hook on the layers ``names`` for the duration of the block.

    Args:
        net: The network.
        names: Module names.
        hook: Called as ``hook(name, input, output)`` after each call of a layer; ``input`` is the layer's first argument.
    """

    def call(name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hook(name, args[0], output)

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(net.get_submodule(name).register_forward_hook(partial(call, name)).remove)
        yield


def layer_names(net: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """List the names of the layers of the given types, in the order of ``named_modules``."""
    return [name for name, layer in net.named_modules() if isinstance(layer, kinds)]
