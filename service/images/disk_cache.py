"""Small files that can be made again, kept under a name on disk within a bound; in memory where the disk takes none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from models.artifacts.atomic_io import atomic_write

MEMORY_BYTES = 16 << 20
ACCESS_TIME_RESOLUTION_S = 3600.0  # how coarsely the last use is noted, as noting it is a write
STALE_S = 3600.0  # a half-written file of a process that was killed


class _File(NamedTuple):
    used_s: float
    size: int
    path: Path


class DiskCache:
    """Keep up to ``limit_bytes`` in ``folder``, and drop those that were not used for longest; without one, some in memory.

    Several processes share a folder: each looks through it when it has itself added a twentieth of the limit, and then drops
    what is over nine tenths. So W of them keep to 0.9 + W / 20 of the limit.
    """

    def __init__(self, folder: Path | None, *, limit_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder = folder if limit_bytes else None
        self._limit, self._memory_limit = limit_bytes, memory_bytes
        self._added: int | None = None  # since the folder was looked through; None where it never was
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self._trimming = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """What was put under ``name``, any text, unless it was dropped since."""
        with self._lock:
            if name in self._memory:
                self._memory.move_to_end(name)
                return self._memory[name]
        if self._folder is None:
            return None
        with contextlib.suppress(OSError):
            path = _path(self._folder, name)
            with path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > ACCESS_TIME_RESOLUTION_S:
                    with contextlib.suppress(OSError):
                        os.utime(path)
                return file.read()
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep ``data``, on disk where that is possible. Never raises for a disk that is full or not to be written."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                with atomic_write(_path(self._folder, name)) as part:
                    part.write_bytes(data)
                self._grown(len(data))
                return
        with self._lock:
            self._held += len(data) - len(self._memory.pop(name, b""))
            self._memory[name] = data
            while self._held > self._memory_limit:
                self._held -= len(self._memory.popitem(last=False)[1])

    def remove(self, name: str) -> None:
        """Forget ``name``, as where what was kept turns out to be damaged."""
        with self._lock:
            self._held -= len(self._memory.pop(name, b""))
        if self._folder is not None:
            with contextlib.suppress(OSError):
                _path(self._folder, name).unlink()

    def _grown(self, size: int) -> None:
        with self._lock:
            if self._added is not None:
                self._added += size
                if self._added <= self._limit // 20:
                    return
            self._added = 0
        if self._trimming.acquire(blocking=False):
            try:
                self._trim()
            finally:
                self._trimming.release()

    def _trim(self) -> None:
        assert self._folder is not None
        files = sorted(_files(self._folder))
        total = sum(file.size for file in files)
        for file in files:
            if total <= self._limit * 9 // 10:
                return
            with contextlib.suppress(OSError):
                file.path.unlink()
            total -= file.size


def _path(folder: Path, name: str) -> Path:
    """A place for any name, even of one that was meant to lead elsewhere; in 256 folders, as one of 100,000 files is slow."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / digest[:2] / digest[2:]


def _files(folder: Path) -> Iterator[_File]:
    """The files that are kept; those that another process left half-written are removed."""
    now = time.time()
    for inner in _entries(folder):
        for entry in _entries(Path(inner.path)):
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if not entry.name.endswith(".part"):
                    yield _File(status.st_mtime, status.st_size, Path(entry.path))
                elif now - status.st_mtime > STALE_S:
                    os.unlink(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
