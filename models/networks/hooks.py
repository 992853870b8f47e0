"""A look at what a network's layers are given and give, while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

LayerHook = Callable[[str, Any, Any], None]


@contextlib.contextmanager
def forward_hooks(net: nn.Module, names: Iterable[str], hook: LayerHook) -> Iterator[None]:
    """Inside the block ``hook(name, given, result)`` is called whenever one of ``net``'s layers ``names`` has run.

    ``given`` is its first argument; both are tensors, or what else the layer takes and gives.
    """

    def call(name: str, layer: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        hook(name, given[0], result)

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(net.get_submodule(name).register_forward_hook(partial(call, name)).remove)
        yield


def layer_names(net: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """The names of the layers of these kinds, in the order in which the network lists them."""
    return [name for name, layer in net.named_modules() if isinstance(layer, kinds)]
