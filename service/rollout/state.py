"""The rollout state that all workers share: which bundle serves, which one did before, and what was rejected last.

gunicorn's master creates the state before it forks. It is an unlinked file that the workers inherit: no cleaner of temporary
files can remove it, and nothing is left behind when the server is killed. Only with the studio the selected bundles are also
saved, in STUDIO_DIR, so that a restarted server serves the bundle that was put live. They hold until BUNDLE names another
folder: the last decision wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import struct
import tempfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.bundle import MANIFEST, open_bundle
from models.artifacts.paths import resolve_bundle
from models.errors import BundleError
from service.http.errors import Problem
from service.settings import Settings

log = logging.getLogger("service.rollout")
LIVE = "live.json"  # file in STUDIO_DIR
SLOT_BYTES = 1 << 20  # the file has two slots for documents and a header that names the valid one
HEADER = struct.Struct("<II")  # slot and length of the document
DOCUMENT_LOCK, ROLLOUT_LOCK = 1 << 40, (1 << 40) + 1  # bytes beyond the end of the file


@dataclass(frozen=True)
class SelectedBundle:
    """A bundle that was selected to serve: its folder, name and version, who selected it, and when (UTC)."""

    bundle: str
    name: str
    version: str
    actor: str
    time: str
    agreement: dict[str, Any] | None = None


@dataclass(frozen=True)
class RejectedBundle:
    """A bundle that was rejected, and why."""

    bundle: str
    code: str
    reason: str
    actor: str
    time: str


@dataclass(frozen=True)
class RolloutState:
    """The whole state. ``link_fingerprint`` is that of BUNDLE's target when it was last considered, whatever the outcome."""

    active: SelectedBundle | None = None
    previous: SelectedBundle | None = None
    last_rejection: RejectedBundle | None = None
    link_fingerprint: str | None = None


class RolloutStore:
    """The state in an anonymous file, for this process and those forked from it.

    Each read and write locks the file for a moment. ``lock`` is held during a rollout, so that there is one at a time.
    """

    def __init__(self, state: RolloutState = RolloutState(), *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        with tempfile.TemporaryFile() as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self._document_lock, self._rollout_lock = threading.Lock(), threading.Lock()  # POSIX locks are per process
        self._write_document({"state": dataclasses.asdict(state), "workers": {}, "has_served": False}, slot=0)

    def read(self) -> RolloutState:
        """Return the current state."""
        rows = self._read_document()["state"]
        selected = {name: SelectedBundle(**rows[name]) if rows[name] else None for name in ("active", "previous")}
        rejection = RejectedBundle(**rows["last_rejection"]) if rows["last_rejection"] else None
        return RolloutState(**selected, last_rejection=rejection, link_fingerprint=rows["link_fingerprint"])

    def write(self, state: RolloutState) -> None:
        """Replace the state; call it inside ``lock`` only. After an error the old state holds."""
        with self._editing() as document:
            document["state"] = dataclasses.asdict(state)

    def set_initial(self, active: SelectedBundle) -> None:
        """Make ``active`` the active bundle if there is none."""
        with self._editing() as document:
            if document["state"]["active"] is None:
                document["state"]["active"] = dataclasses.asdict(active)

    def bundles_to_load(self) -> list[Path]:
        """Return the folders that a starting worker should try: that of the active bundle, then of the previous one."""
        state = self.read()
        return [Path(selected.bundle) for selected in (state.active, state.previous) if selected]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to change the state. A killed process releases it.

        Raises:
            Problem: Another thread or worker holds it.
        """
        busy = Problem("rollout_in_progress", "Another bundle is being loaded and checked. Retry when it is done.")
        if not self._rollout_lock.acquire(blocking=False):
            raise busy
        try:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, ROLLOUT_LOCK)
            except OSError:
                raise busy from None
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, ROLLOUT_LOCK)
        finally:
            self._rollout_lock.release()

    def publish_version(self, version: str) -> None:
        """Record which version this process serves."""
        with self._editing() as document:
            document["workers"][str(os.getpid())] = version
            document["has_served"] = True

    def remove_worker(self, pid: int) -> None:
        """Forget a worker that has ended."""
        with self._editing() as document:
            document["workers"].pop(str(pid), None)

    def worker_versions(self) -> dict[int, str]:
        """Map the process ids of the workers that serve to their versions."""
        workers = self._read_document()["workers"]
        return {pid: workers[str(pid)] for pid in sorted(map(int, workers))}

    @property
    def has_served(self) -> bool:
        """Whether a worker of this server has been ready since the server started."""
        return bool(self._read_document()["has_served"])

    @contextlib.contextmanager
    def _editing(self) -> Iterator[dict[str, Any]]:
        with self._locked_document():
            document, slot = self._load_document()
            yield document
            self._write_document(document, slot=1 - slot)

    def _read_document(self) -> dict[str, Any]:
        with self._locked_document():
            return self._load_document()[0]

    @contextlib.contextmanager
    def _locked_document(self) -> Iterator[None]:
        with self._document_lock:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, DOCUMENT_LOCK)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, DOCUMENT_LOCK)

    def _load_document(self) -> tuple[dict[str, Any], int]:
        slot, length = HEADER.unpack(os.pread(self._fd, HEADER.size, 0))
        return json.loads(os.pread(self._fd, length, (slot + 1) * SLOT_BYTES)), slot

    def _write_document(self, document: dict[str, Any], *, slot: int) -> None:
        """Write the document to a slot that is not in use, then name it valid: a full disk or a kill leaves the old one."""
        data = json.dumps(document).encode()
        if len(data) > SLOT_BYTES or os.pwrite(self._fd, data, (slot + 1) * SLOT_BYTES) < len(data):
            raise OSError("The rollout state could not be written completely.")
        os.pwrite(self._fd, HEADER.pack(slot, len(data)), 0)


_shared: RolloutStore | None = None


def share_store(settings: Settings) -> RolloutStore:
    """Create the store of the workers that this process forks from now on."""
    global _shared
    _shared = RolloutStore(initial_state(settings), is_shared=True)
    return _shared


def open_store(settings: Settings) -> RolloutStore:
    """Return the store that the parent process shares, or one for this process alone."""
    return _shared or RolloutStore(initial_state(settings))


def initial_state(settings: Settings) -> RolloutState:
    """Return the state of a starting server. Nothing is active if BUNDLE cannot be opened or has yet to be merged."""
    fingerprint = bundle_fingerprint(settings.bundle)
    if saved := load_selection(settings):
        return RolloutState(active=saved[0], previous=saved[1], link_fingerprint=fingerprint)
    try:
        folder = settings.bundle.resolve()
        bundle = open_bundle(resolve_bundle(folder), files=())
    except (BundleError, OSError, RuntimeError):
        return RolloutState(link_fingerprint=fingerprint)
    active = SelectedBundle(str(folder), bundle.name, bundle.version, actor="BUNDLE", time=utc_now())
    return RolloutState(active=active, link_fingerprint=fingerprint)


def save_selection(settings: Settings, state: RolloutState) -> None:
    """Save the active and the previous bundle for the next start, if the studio is on. Raises OSError."""
    if not settings.studio:
        return
    selected = {name: row and dataclasses.asdict(row) for name, row in (("active", state.active), ("previous", state.previous))}
    document = {"bundle_setting": str(settings.bundle.resolve()), **selected}
    atomic_write_text(settings.resolved_studio_dir / LIVE, json.dumps(document, indent=2) + "\n")


def load_selection(settings: Settings) -> tuple[SelectedBundle, SelectedBundle | None] | None:
    """Return the active and the previous bundle that were saved, as far as they still exist and BUNDLE has not changed since.

    If only the previous one exists, it is the active one.
    """
    if not settings.studio:
        return None
    try:
        document = json.loads((settings.resolved_studio_dir / LIVE).read_text(encoding="utf-8"))
        rows = [SelectedBundle(**document[name]) for name in ("active", "previous") if document[name]]
        if document["bundle_setting"] != str(settings.bundle.resolve()):
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("the bundle that was put live is unknown", extra={"file": LIVE, "reason": repr(error)})
        return None
    existing = [row for row in rows if _has_version(Path(row.bundle), row.version)]
    if missing := [row for row in rows if row not in existing]:
        log.error("a bundle that was live no longer exists", extra={"bundles": [row.bundle for row in missing]})
    return (existing[0], existing[1] if len(existing) > 1 else None) if existing else None


def _has_version(folder: Path, version: str) -> bool:
    try:
        return open_bundle(resolve_bundle(folder), files=()).version == version
    except (BundleError, OSError, RuntimeError):
        return False


def is_symlinked(path: Path) -> bool:
    """Return whether ``path`` contains a symbolic link, so that it can be made to lead elsewhere."""
    return path.resolve() != path.absolute()


def bundle_fingerprint(path: Path) -> str | None:
    """Hash where ``path`` leads and the sizes and times of the files there, which change while a bundle is being copied.

    Returns:
        The digest, or None if there is no readable manifest.
    """
    try:
        folder = path.resolve()
        manifest = (folder / MANIFEST).read_bytes()
        names = sorted(json.loads(manifest)["files"])
        files = [(name, stat.st_size, stat.st_mtime_ns) for name in names if (stat := _stat(folder / name))]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None
    return hashlib.sha256(repr((str(folder), manifest, files)).encode()).hexdigest()


def utc_now() -> str:
    """Return the time in UTC in ISO 8601 format."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None
