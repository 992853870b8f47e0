"""The networks by name. A file in ``models/zoo`` registers its own; nothing else needs to know it (after timm's registry)."""

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

    Where ``in_channels`` is not asked for, it is not given: its default is what ``spec`` says, and a design that knows only
    one number of channels can leave it out. Raises ValueError where the name is taken.
    """

    def register(builder: Builder) -> Builder:
        if spec.name in _ENTRIES:
            place = getattr(_ENTRIES[spec.name][1], "__module__", "another file")
            raise ValueError(f"a network named {spec.name!r} is registered already, by {place}; choose another name")
        _ENTRIES[spec.name] = (spec, builder)
        return builder

    return register


def register_library(prefix: str) -> Callable[[Callable[[str], Entry]], Callable[[str], Entry]]:
    """Register the decorated ``find(NAME)``, which gives the spec and the builder of any network called ``prefix:NAME``.

    It raises UnknownModelError for a name that it does not know.
    """

    def register(find: Callable[[str], Entry]) -> Callable[[str], Entry]:
        if prefix in _LIBRARIES:
            raise ValueError(f"a library of networks named {prefix!r} is registered already; choose another name")
        _LIBRARIES[prefix] = cache(find)
        return find

    return register


def list_models() -> list[str]:
    """The names of all networks of this project, in alphabetical order; those of a library (``timm:NAME``) are left out."""
    return sorted(_load())


def get_spec(name: str) -> ModelSpec:
    """What is known about the network ``name``. Raises UnknownModelError, which proposes the nearest name."""
    return _entry(name)[0]


def create_model(name: str, *, num_classes: int | None = None, in_channels: int | None = None, **design: Any) -> nn.Module:
    """Build the network ``name`` with random weights.

    It takes (N, C, input_px, input_px) float32 as ``get_spec(name).preprocessing`` says and gives (N, num_classes) logits.
    ``num_classes`` is that of the pretrained weights where none is given, ``in_channels`` (C) that of its preprocessing.
    ``design`` is what the builder itself takes: ``width`` of MobileNetV1, ``units`` of the MLP, ``aux`` of GoogLeNet.
    Raises UnknownModelError.
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
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _LIBRARIES:
        return _LIBRARIES[prefix](rest)
    raise UnknownModelError(
        f"There is no network named {name!r}.{did_you_mean(name, entries)} `finetune models` lists all of them."
    )
