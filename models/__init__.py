"""Networks, their preprocessing and the bundle that passes between training and serving.

Importing this package does not import torch, so that a server can read bundles without it; the names below do, on first use.
"""

from __future__ import annotations

from typing import Any

__all__ = ["create_model", "get_spec", "list_models", "register_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from models.networks import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
