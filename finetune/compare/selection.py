"""Select the networks of a comparison by name or group."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import ConfigError
from models.networks.registry import get_spec, list_models
from models.networks.spec import ModelSpec
from models.networks.weights import has_local_weights

SMALL_PX = 64
SMALL, ALL = "small", "all"


def select_networks(text: str) -> list[str]:
    """Return the networks of a comma-separated list of names and groups, without duplicates.

    The group ``small`` contains the networks of this project that are trained from random weights on images of up to 64 px,
    ``all`` those whose pretrained weights are on this machine.

    Raises:
        UnknownModelError: A name is unknown.
        ConfigError: The list is empty.
    """
    names: list[str] = []
    for word in filter(None, map(str.strip, text.split(","))):
        if word == SMALL:
            names += [name for name in list_models() if is_small(get_spec(name))]
        elif word == ALL:
            names += [name for name in list_models() if has_local_weights(get_spec(name))]
        else:
            names.append(get_spec(word).name)
    if not names:
        raise ConfigError(f"--backbones takes comma-separated network names, `small` or `all` (got {text!r}).")
    return list(dict.fromkeys(names))


def is_small(spec: ModelSpec) -> bool:
    return spec.weights is None and spec.preprocessing.input_px <= SMALL_PX


def run_folder_name(backbone: str) -> str:
    """Return a folder name for a network, such as ``timm-convnext_tiny`` for ``timm:convnext_tiny``."""
    return backbone.replace(":", "-").replace("/", "-")


def require_two(names: Sequence[str]) -> None:
    """Raise ConfigError for fewer than two networks."""
    if len(names) < 2:
        raise ConfigError(f"--backbones must name at least two networks (got only {names[0]}).")
