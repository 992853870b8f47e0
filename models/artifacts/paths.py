"""Default directories for caches and user data, following the XDG Base Directory specification."""

from __future__ import annotations

import os
from pathlib import Path

from models.artifacts.bundle import Bundle, open_bundle
from models.errors import BundleError


def default_cache_dir() -> Path:
    """Return the directory for data that can be recomputed, under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def default_data_dir() -> Path:
    """Return the directory for data that cannot be recomputed, under ``XDG_DATA_HOME`` or ``~/.local/share``."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "finetune"


def merged_dir(bundle: Bundle) -> Path:
    """Return where training stores, and the service expects, the full bundle merged from a head-only one."""
    return default_cache_dir() / "merged" / f"{bundle.name}-{bundle.version}"


def compiled_dir() -> Path | None:
    """Return the cache directory for compiled networks, or None if it is not writable (a read-only container)."""
    return _writable_cache("compiled")


def speed_dir() -> Path | None:
    """Return the cache directory for speeds that were measured on this machine, or None if it is not writable."""
    return _writable_cache("speed")


def thumbnails_dir() -> Path | None:
    """Return the cache directory for thumbnails, or None if it is not writable."""
    return _writable_cache("thumbnails")


def _writable_cache(name: str) -> Path | None:
    try:
        folder = default_cache_dir() / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    return folder if os.access(folder, os.W_OK) else None


def resolve_bundle(path: Path) -> Path:
    """Return the path of a full bundle: ``path`` itself, or the bundle merged from the head-only bundle at ``path``.

    Only the manifest is verified; opening the bundle verifies its files.

    Raises:
        BundleError: ``path`` is not a bundle, or it is a head-only bundle that has not been merged.
    """
    bundle = open_bundle(path, files=())
    if not bundle.is_head_only:
        return path
    if merged_dir(bundle).is_dir():
        return merged_dir(bundle)
    raise BundleError(
        f"The bundle {path} contains only the trained layers. Run `finetune merge {path}` once to add the pretrained weights, "
        "then start again."
    )
