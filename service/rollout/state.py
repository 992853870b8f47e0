"""What all workers read: which bundle serves, which one did before, and what was refused last; kept as long as the server runs.

gunicorn's master makes the folder before it forks (``found``); a worker that takes a dead one's place reads there what to load.
Without such a folder, as in a single process, it is kept in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.artifacts.atomic_io import atomic_write_text
from service.http.errors import Problem

STATE_DIR_VARIABLE = "SERVICE_ROLLOUT_DIR"
STATE, LOCK, WORKER = "state.json", "lock", "worker-"


@dataclass(frozen=True)
class SelectedBundle:
    """A bundle that was chosen to serve: its folder, what it is called, who chose it and when (UTC)."""

    bundle: str
    name: str
    version: str
    actor: str
    time: str
    agreement: dict[str, Any] | None = None


@dataclass(frozen=True)
class RejectedBundle:
    """A bundle that was not taken, and why."""

    bundle: str
    code: str
    reason: str
    actor: str
    time: str


@dataclass(frozen=True)
class RolloutState:
    """All of it. ``link_fingerprint`` tells what BUNDLE led to when that was last looked into, whatever came of it."""

    active: SelectedBundle | None = None
    previous: SelectedBundle | None = None
    last_rejection: RejectedBundle | None = None
    link_fingerprint: str | None = None


class RolloutStore:
    """The state, in ``folder`` for all workers or else in memory. One at a time may decide; all may read."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._state = RolloutState()
        self._deciding = threading.Lock()
        self._workers: dict[int, str] = {}

    @classmethod
    def from_environment(cls) -> RolloutStore:
        """The one that the master made, or one in memory."""
        folder = os.environ.get(STATE_DIR_VARIABLE)
        return cls(Path(folder) if folder else None)

    @property
    def is_shared(self) -> bool:
        """Whether other workers see it."""
        return self._folder is not None

    def read(self) -> RolloutState:
        if self._folder is None:
            return self._state
        try:
            rows = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return RolloutState()
        chosen = {name: SelectedBundle(**rows[name]) if rows[name] else None for name in ("active", "previous")}
        return RolloutState(
            **chosen,
            last_rejection=RejectedBundle(**rows["last_rejection"]) if rows["last_rejection"] else None,
            link_fingerprint=rows["link_fingerprint"],
        )

    def write(self, state: RolloutState) -> None:
        """Whole or not at all. Only inside ``lock``."""
        if self._folder is None:
            self._state = state
        else:
            atomic_write_text(self._folder / STATE, json.dumps(dataclasses.asdict(state)))

    @contextlib.contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Nobody else decides meanwhile, in no worker. Where somebody does, ``wait`` for it, or raise Problem at once.

        One that was killed decides no longer.
        """
        with contextlib.ExitStack() as held:
            busy = Problem("rollout_in_progress", "Another bundle is being loaded and checked; ask again when that is done.")
            if not self._deciding.acquire(blocking=wait):
                raise busy
            held.callback(self._deciding.release)
            if self._folder is not None:
                file = held.enter_context((self._folder / LOCK).open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except OSError:
                    raise busy from None
            yield

    def publish_version(self, version: str) -> None:
        """Note what this process serves."""
        self._workers[os.getpid()] = version
        if self._folder is not None:
            atomic_write_text(self._folder / f"{WORKER}{os.getpid()}", version)

    def worker_versions(self) -> dict[int, str]:
        """Process id -> the version that it serves."""
        if self._folder is None:
            return dict(self._workers)
        found = {}
        for file in sorted(self._folder.glob(f"{WORKER}*")):
            with contextlib.suppress(FileNotFoundError):  # it ended just now
                found[int(file.name.removeprefix(WORKER))] = file.read_text(encoding="utf-8")
        return found


def create_state_dir() -> Path:
    """For the master: a folder that the workers forked from now on find."""
    folder = Path(tempfile.mkdtemp(prefix="dogs-vs-cats-rollout-"))
    os.environ[STATE_DIR_VARIABLE] = str(folder)
    return folder


def remove_worker(pid: int) -> None:
    """For the master: a worker has ended."""
    (Path(os.environ[STATE_DIR_VARIABLE]) / f"{WORKER}{pid}").unlink(missing_ok=True)
