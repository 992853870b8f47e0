"""A size-limited, content-addressed cache of array rows on disk, shared between runs.

Rows that were computed in the same way (their ``context``) are stored in a folder named after the context's sha256, in files
of 256 rows. Each file holds the rows and the sha256 of each row's input. Files are written atomically and never change, so
several runs can read and write at the same time. Damaged files are deleted and their rows computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from models.artifacts.atomic_io import atomic_write, atomic_write_text

ROWS_PER_FILE = 256


class ArrayStore:
    """A cache of rows by key for one context.

    Args:
        root: Cache folder, shared by all contexts.
        context: All that the rows depend on besides their input, as JSON-compatible data.
        limit_mb: Maximum size of ``root`` in MB, enforced after each write.
    """

    def __init__(self, root: Path, context: Mapping[str, Any], *, limit_mb: int) -> None:
        text = json.dumps(context, sort_keys=True)
        self._root = root
        self._folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        self._context = text
        self._limit_bytes = limit_mb * 1_000_000
        self._pending: dict[str, NDArray[Any]] = {}
        self._files: dict[str, Path] = {}
        self._indexed: set[Path] = set()

    def index(self) -> None:
        """Read the keys of the files on disk, and delete damaged files. Files that were read before are not read again."""
        for file in sorted(self._folder.glob("*.safetensors")) if self._folder.is_dir() else ():
            if file not in self._indexed:
                self._indexed.add(file)
                self._files.update((key, file) for key, _ in _read(file))

    def __contains__(self, key: str) -> bool:
        """Return whether a row was on disk at the last ``index``, or was added since."""
        return key in self._pending or key in self._files

    def load(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Return the cached rows among ``keys`` (hexadecimal sha256s)."""
        keys = list(keys)
        rows = dict(self.rows(keys))
        return {key: rows[key] for key in keys if key in rows}

    def rows(self, keys: Iterable[str]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the cached rows among ``keys`` in any order, with one file in memory."""
        missing = set(keys)
        for key in missing & self._pending.keys():
            yield key, self._pending[key]
        missing -= self._pending.keys()
        if missing - self._files.keys():
            self.index()  # another run may have written more
        for file in sorted({self._files[key] for key in missing & self._files.keys()}):
            matches = [(key, row) for key, row in _read(file) if key in missing]
            missing -= {key for key, _ in matches}
            yield from matches
            if matches:
                with contextlib.suppress(OSError):
                    os.utime(file)  # marks the file as recently used

    def add(self, key: str, row: NDArray[Any]) -> None:
        """Add a row. It is written to disk when a file is full, or by ``flush``."""
        self._pending[key] = row
        if len(self._pending) >= ROWS_PER_FILE:
            self.flush()

    def scratch(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Create an array in a file without a name, which the system can move out of memory and deletes with the array.

        Raises:
            OSError: The disk is full.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._root) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process when the array is filled
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            return np.asarray(np.memmap(file, np.float32, "w+", shape=shape))

    def flush(self) -> None:
        """Write the pending rows to disk, then prune the cache to its size limit."""
        if not self._pending:
            return
        keys = np.frombuffer(bytes.fromhex("".join(self._pending)), dtype=np.uint8).reshape(-1, 32)
        rows = np.stack(list(self._pending.values()))
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "context.json").exists():
            atomic_write_text(self._folder / "context.json", self._context + "\n")
        file = self._folder / f"{uuid.uuid4().hex}.safetensors"
        with atomic_write(file) as temporary:
            temporary.write_bytes(save({"keys": keys, "rows": rows}, {"crc32": str(_checksum(keys, rows))}))
        self._indexed.add(file)
        self._files.update(dict.fromkeys(self._pending, file))
        self._pending.clear()
        prune(self._root, self._limit_bytes)


def _read(file: Path) -> list[tuple[str, NDArray[Any]]]:
    """Read the rows of a file with their keys. Deletes the file if it is damaged."""
    try:
        data = file.read_bytes()
        arrays = load(data)
        keys, rows = arrays["keys"], arrays["rows"]
        if _metadata(data).get("crc32") != str(_checksum(keys, rows)):
            raise ValueError("checksum")
    except FileNotFoundError:  # pruned by another run
        return []
    except (SafetensorError, KeyError, ValueError):
        file.unlink(missing_ok=True)
        return []
    return list(zip((bytes(key).hex() for key in keys), rows, strict=True))


def prune(root: Path, limit_bytes: int) -> None:
    """Delete the least recently used files until ``root`` takes at most ``limit_bytes``."""
    files = []
    for file in (*root.glob("*/*.safetensors"), *root.glob("*/.*.part")):  # a killed run leaves its temporary file
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            files.append((stat.st_mtime_ns, stat.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= limit_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size


def _checksum(keys: NDArray[np.uint8], rows: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).tobytes(), zlib.crc32(keys.tobytes()))


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})
