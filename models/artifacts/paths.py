"""Where a person's machine keeps features, bundles merged with their base, and decisions about photos."""

from __future__ import annotations

import os
from pathlib import Path

from models.artifacts.bundle import Bundle, open_bundle
from models.errors import BundleError


def default_cache_dir() -> Path:
    """Under ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def default_data_dir() -> Path:
    """Under ``XDG_DATA_HOME``, or ``~/.local/share``: for what cannot be made again, as people's decisions."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "finetune"


def merged_dir(bundle: Bundle) -> Path:
    """Where the whole bundle lies that was made of this head-only one, if it was: training puts it, the service looks."""
    return default_cache_dir() / "merged" / f"{bundle.name}-{bundle.version}"


def compiled_dir() -> Path | None:
    """Where an engine may keep what it compiled; None where this process cannot write, as in a read-only container."""
    return _writable("compiled")


def thumbnails_dir() -> Path | None:
    """Where the service may keep small pictures of photos; None where this process cannot write."""
    return _writable("thumbnails")


def _writable(name: str) -> Path | None:
    try:
        folder = default_cache_dir() / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if os.access(folder, os.W_OK) else None


def resolve_bundle(path: Path) -> Path:
    """Where the bundle is that can answer: at ``path``, or where its merged one is. Raises BundleError where there is none.

    Only the manifest is looked at; who opens the bundle checks its files.
    """
    bundle = open_bundle(path, files=())
    if not bundle.is_head_only:
        return path
    if merged_dir(bundle).is_dir():
        return merged_dir(bundle)
    raise BundleError(
        f"The bundle {path} holds only what was trained; make it whole with `finetune merge {path}`, once, and start again."
    )
