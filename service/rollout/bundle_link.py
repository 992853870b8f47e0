"""What BUNDLE leads to now, where it is a link or goes through one: ``current`` that is made to point to another folder."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path

from models.artifacts.bundle import MANIFEST, open_bundle
from models.artifacts.paths import resolve_bundle
from service.rollout.state import RolloutState, SelectedBundle
from service.settings import Settings


def is_symlinked(path: Path) -> bool:
    """Whether the way to ``path`` has a link in it, so that it can be made to lead elsewhere."""
    return path.resolve() != path.absolute()


def bundle_fingerprint(path: Path) -> str | None:
    """Where ``path`` leads and what lies there, as a digest: it changes with the link, and while files arrive behind it.

    None while there is no manifest that can be read.
    """
    folder = path.resolve()
    try:
        manifest = (folder / MANIFEST).read_bytes()
        names = sorted(json.loads(manifest)["files"])
        files = [(name, file.st_size, file.st_mtime_ns) for name in names if (file := _stat(folder / name))]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return hashlib.sha256(repr((str(folder), manifest, files)).encode()).hexdigest()


def initial_state(settings: Settings) -> RolloutState:
    """What serves when the server starts. Raises BundleError."""
    folder = settings.bundle.resolve()
    bundle = open_bundle(resolve_bundle(folder), files=())
    active = SelectedBundle(str(folder), bundle.name, bundle.version, actor="BUNDLE", time=utc_now())
    return RolloutState(active=active, link_fingerprint=bundle_fingerprint(settings.bundle))


def utc_now() -> str:
    """The time in UTC, as ISO 8601 has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None
