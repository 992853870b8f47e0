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

FOLDER = "SERVICE_BOARD_DIR"
STATE, LOCK, WORKER = "state.json", "lock", "worker-"


@dataclass(frozen=True)
class Chosen:
    """A bundle that was chosen to serve: its folder, what it is called, who chose it and when (UTC)."""

    bundle: str
    name: str
    version: str
    by: str
    at: str
    agreement: dict[str, Any] | None = None


@dataclass(frozen=True)
class Refused:
    """A bundle that was not taken, and why."""

    bundle: str
    code: str
    why: str
    by: str
    at: str


@dataclass(frozen=True)
class State:
    """All of it. ``link`` tells what BUNDLE led to when that was last looked into, whatever came of it."""

    serving: Chosen | None = None
    before: Chosen | None = None
    refusal: Refused | None = None
    link: str | None = None


class Board:
    """The state, in ``folder`` for all workers or else in memory. One at a time may decide; all may read."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._state = State()
        self._deciding = threading.Lock()
        self._workers: dict[int, str] = {}

    @classmethod
    def of_this_server(cls) -> Board:
        """The one that the master made, or one in memory."""
        folder = os.environ.get(FOLDER)
        return cls(Path(folder) if folder else None)

    @property
    def is_shared(self) -> bool:
        """Whether other workers see it."""
        return self._folder is not None

    def read(self) -> State:
        if self._folder is None:
            return self._state
        try:
            rows = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State()
        chosen = {name: Chosen(**rows[name]) if rows[name] else None for name in ("serving", "before")}
        return State(**chosen, refusal=Refused(**rows["refusal"]) if rows["refusal"] else None, link=rows["link"])

    def write(self, state: State) -> None:
        """Whole or not at all. Only inside ``deciding``."""
        if self._folder is None:
            self._state = state
        else:
            atomic_write_text(self._folder / STATE, json.dumps(dataclasses.asdict(state)))

    @contextlib.contextmanager
    def deciding(self, *, wait: bool = False) -> Iterator[None]:
        """Nobody else decides meanwhile, in no worker. Where somebody does, ``wait`` for it, or raise Problem at once.

        One that was killed decides no longer.
        """
        with contextlib.ExitStack() as held:
            busy = Problem("swap_in_progress", "Another bundle is being loaded and checked; ask again when that is done.")
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

    def tell(self, version: str) -> None:
        """Note what this process serves."""
        self._workers[os.getpid()] = version
        if self._folder is not None:
            atomic_write_text(self._folder / f"{WORKER}{os.getpid()}", version)

    def workers(self) -> dict[int, str]:
        """Process id -> the version that it serves."""
        if self._folder is None:
            return dict(self._workers)
        found = {}
        for file in sorted(self._folder.glob(f"{WORKER}*")):
            with contextlib.suppress(FileNotFoundError):  # it ended just now
                found[int(file.name.removeprefix(WORKER))] = file.read_text(encoding="utf-8")
        return found


def make_folder() -> Path:
    """For the master: a folder that the workers forked from now on find."""
    folder = Path(tempfile.mkdtemp(prefix="dogs-vs-cats-board-"))
    os.environ[FOLDER] = str(folder)
    return folder


def forget_worker(pid: int) -> None:
    """For the master: a worker has ended."""
    (Path(os.environ[FOLDER]) / f"{WORKER}{pid}").unlink(missing_ok=True)
