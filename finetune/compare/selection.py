"""Which networks take part in a comparison: names, and words for several of them."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import ConfigError
from models.networks.registry import get_spec, list_models
from models.networks.spec import ModelSpec
from models.networks.weights import has_local_weights

SMALL_PX = 64
SMALL, ALL = "small", "all"


def select_networks(words: str) -> list[str]:
    """The networks that ``words``, with commas, stand for, each once, in that order.

    ``small`` are those of this project that are trained from random weights and take pictures of 64 px at most (a photo is
    made as small, and grey where they know no colours); ``all`` those whose pretrained weights are on this machine. Raises
    UnknownModelError and ConfigError.
    """
    names: list[str] = []
    for word in filter(None, map(str.strip, words.split(","))):
        if word == SMALL:
            names += [name for name in list_models() if is_small(get_spec(name))]
        elif word == ALL:
            names += [name for name in list_models() if has_local_weights(get_spec(name))]
        else:
            names.append(get_spec(word).name)
    if not names:
        raise ConfigError(f"--backbones is {words!r}, and takes names of networks with commas, `small` or `all`.")
    return list(dict.fromkeys(names))


def is_small(spec: ModelSpec) -> bool:
    return spec.weights is None and spec.preprocessing.input_px <= SMALL_PX


def run_folder_name(backbone: str) -> str:
    """``timm:convnext_tiny`` as a folder's name."""
    return backbone.replace(":", "-").replace("/", "-")


def require_two(names: Sequence[str]) -> None:
    """Raise ConfigError where there is nothing to compare."""
    if len(names) < 2:
        raise ConfigError(f"--backbones names {names[0]} alone, and a comparison takes two or more; add another.")
