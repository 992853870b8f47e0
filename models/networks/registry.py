"""Registry of networks by name. Each file in ``models/zoo`` registers its own networks, as in timm."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from models.errors import UnknownModelError, did_you_mean
from models.networks.spec import ModelSpec

Builder = Callable[..., nn.Module]
Entry = tuple[ModelSpec, Builder]
_ENTRIES: dict[str, Entry] = {}
_LIBRARIES: dict[str, Callable[[str], Entry]] = {}


def register_model(spec: ModelSpec) -> Callable[[Builder], Builder]:
    """Register the decorated ``builder(num_classes, in_channels)`` under ``spec.name``.

    ``in_channels`` is passed only if ``create_model`` gets it. The builder's default must match ``spec``, and a builder for a
    fixed number of channels can omit the parameter.

    Raises:
        ValueError: The name is already registered.
    """

    def register(builder: Builder) -> Builder:
        if spec.name in _ENTRIES:
            module = getattr(_ENTRIES[spec.name][1], "__module__", "another file")
            raise ValueError(f"A network named {spec.name!r} is already registered by {module}. Choose another name.")
        _ENTRIES[spec.name] = (spec, builder)
        return builder

    return register


def register_library(prefix: str) -> Callable[[Callable[[str], Entry]], Callable[[str], Entry]]:
    """Register the decorated ``find(NAME)``, which returns the spec and the builder of the network ``prefix:NAME``.

    ``find`` raises UnknownModelError for an unknown name.

    Raises:
        ValueError: The prefix is already registered.
    """

    def register(find: Callable[[str], Entry]) -> Callable[[str], Entry]:
        if prefix in _LIBRARIES:
            raise ValueError(f"A network library named {prefix!r} is already registered. Choose another name.")
        _LIBRARIES[prefix] = cache(find)
        return find

    return register


def list_models() -> list[str]:
    """List the names of all registered networks in alphabetical order, without those of libraries (``timm:NAME``)."""
    return sorted(_load())


def get_spec(name: str) -> ModelSpec:
    """Return the spec of a network. Raises UnknownModelError, which suggests the closest name."""
    return _entry(name)[0]


def create_model(name: str, *, num_classes: int | None = None, in_channels: int | None = None, **design: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: The name of a registered network, or ``timm:NAME``.
        num_classes: The number of outputs; defaults to that of the pretrained weights.
        in_channels: The number of input channels; defaults to that of the network's preprocessing.
        design: Further parameters of the builder: ``width`` of MobileNetV1, ``units`` of the MLP, ``aux`` of GoogLeNet.

    Returns:
        A module that maps (N, in_channels, input_px, input_px) float32 to (N, num_classes) logits.

    Raises:
        UnknownModelError: No network has this name.
    """
    spec, builder = _entry(name)
    if in_channels is not None:
        design["in_channels"] = in_channels
    return builder(num_classes or spec.pretrained_classes, **design)


@cache
def _load() -> dict[str, Entry]:
    import models.zoo

    for module in pkgutil.iter_modules(models.zoo.__path__):
        importlib.import_module(f"models.zoo.{module.name}")
    return _ENTRIES


def _entry(name: str) -> Entry:
    entries = _load()
    if name in entries:
        return entries[name]
    if "+" in name:
        from models.networks.join import join_entry  # imports this module

        return join_entry(name)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _LIBRARIES:
        return _LIBRARIES[prefix](rest)
    raise UnknownModelError(
        f"There is no network named {name!r}.{did_you_mean(name, entries)} `finetune models` lists all networks."
    )
