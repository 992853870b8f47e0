"""Image classification networks, their preprocessing, and the bundle format shared by training and serving.

Importing this package does not import torch, so a server can read bundles without it. The names below import it on first use.
"""

from __future__ import annotations

from typing import Any

__all__ = ["create_model", "get_spec", "list_models", "register_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from models.networks import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
