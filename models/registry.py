"""The networks by name. A file in ``models/zoo`` registers its own; nothing else needs to know it (after timm's registry)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from torch import nn

from models.errors import UnknownModelError, did_you_mean
from models.spec import ModelSpec

Builder = Callable[[int], nn.Module]
_ENTRIES: dict[str, tuple[ModelSpec, Builder]] = {}


def register_model(spec: ModelSpec) -> Callable[[Builder], Builder]:
    """Register the decorated ``builder(num_classes)`` under ``spec.name``. Raises ValueError where the name is taken."""

    def register(builder: Builder) -> Builder:
        if spec.name in _ENTRIES:
            raise ValueError(f"a network named {spec.name!r} is registered already")
        _ENTRIES[spec.name] = (spec, builder)
        return builder

    return register


def list_models() -> list[str]:
    """The names of all networks, in alphabetical order."""
    return sorted(_load())


def get_spec(name: str) -> ModelSpec:
    """What is known about the network ``name``. Raises UnknownModelError, which proposes the nearest name."""
    return _entry(name)[0]


def create_model(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Build the network ``name`` with random weights.

    It takes (N, C, input_px, input_px) float32 as ``get_spec(name).preprocessing`` says and gives (N, num_classes) logits.
    ``num_classes`` is that of the pretrained weights where none is given. Raises UnknownModelError.
    """
    spec, builder = _entry(name)
    return builder(num_classes or spec.pretrained_classes)


@cache
def _load() -> dict[str, tuple[ModelSpec, Builder]]:
    import models.zoo

    for module in pkgutil.iter_modules(models.zoo.__path__):
        importlib.import_module(f"models.zoo.{module.name}")
    return _ENTRIES


def _entry(name: str) -> tuple[ModelSpec, Builder]:
    entries = _load()
    if name not in entries:
        raise UnknownModelError(
            f"There is no network named {name!r}.{did_you_mean(name, entries)} `finetune models` lists all of them."
        )
    return entries[name]
