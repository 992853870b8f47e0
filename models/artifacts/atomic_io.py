"""Atomic file writes, locks between processes, and file hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename it to ``path`` if the block succeeds.

    After an error, a kill or a full disk the old file is unchanged; a partial file is never visible at ``path``. Missing
    parent folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temp = Path(name)
    try:
        yield temp
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.chmod(0o644)  # mkstemp sets 0600, but the service may run as another user
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` to a file as UTF-8, atomically. File names that are not UTF-8 are escaped, as in JSON (``\\udce9``)."""
    with atomic_write(path) as temp:
        temp.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file in chunks; returns 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Hold a lock on a folder, for which other processes wait. Windows has no such locks."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
