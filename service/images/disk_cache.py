"""Cache small files that can be created again on disk, within a size limit; in memory if the disk is not writable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

from models.artifacts.atomic_io import atomic_write

MEMORY_BYTES = 16 << 20
ACCESS_TIME_RESOLUTION_S = 3600.0  # recording an access is a write
STALE_S = 3600.0  # the age of an incomplete file that a killed process left


class DiskCache:
    """Least-recently-used cache of bytes by name.

    Several processes share a folder. Each trims it to nine tenths of the limit after it has added a twentieth of the limit, so
    that W processes use at most 0.9 + W / 20 of the limit.
    """

    def __init__(self, folder: Path | None, *, limit_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        """Create the cache.

        Args:
            folder: The folder, or None for a cache in memory.
            limit_bytes: The size limit of the folder; 0 for a cache in memory.
            memory_bytes: The size limit in memory.
        """
        self._folder = folder if limit_bytes else None
        self._limit, self._memory_limit = limit_bytes, memory_bytes
        self._added: int | None = None  # since the last trim; None before the first
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._memory_used = 0
        self._lock = threading.Lock()
        self._trimming = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """Return what was put under ``name`` (any text), or None if it is not cached."""
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
        """Store ``data``, in memory if the disk is full or not writable."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                with atomic_write(_path(self._folder, name)) as temporary:
                    temporary.write_bytes(data)
                self._count_added(len(data))
                return
        with self._lock:
            self._memory_used += len(data) - len(self._memory.pop(name, b""))
            self._memory[name] = data
            while self._memory_used > self._memory_limit:
                self._memory_used -= len(self._memory.popitem(last=False)[1])

    def remove(self, name: str) -> None:
        """Remove ``name``, for example because the cached file is damaged."""
        with self._lock:
            self._memory_used -= len(self._memory.pop(name, b""))
        if self._folder is not None:
            with contextlib.suppress(OSError):
                _path(self._folder, name).unlink()

    def _count_added(self, size: int) -> None:
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
        """Remove the least recently used files, and incomplete ones that are stale."""
        assert self._folder is not None
        now, files = time.time(), []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process has removed it
                status = path.lstat()
                if path.suffix != ".part":
                    files.append((status.st_mtime, status.st_size, path))
                elif now - status.st_mtime > STALE_S:
                    path.unlink()
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit * 9 // 10:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _path(folder: Path, name: str) -> Path:
    """Map any name to a path inside the folder. There are 256 subfolders, as a folder of 100,000 files is slow."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / digest[:2] / digest[2:]
