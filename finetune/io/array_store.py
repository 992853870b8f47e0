"""A size-limited, content-addressed cache of array rows on disk, shared between runs.

Rows that were computed in the same way (their ``context``) are stored in a folder named after the context's sha256, in files
of 256 rows. Each file holds the rows and the sha256 of each row's input. Files are written atomically and never change, so
several runs can read and write at the same time. Damaged files are deleted and their rows computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping
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
        self._rows: dict[str, NDArray[Any]] = {}

    def load(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Return the cached rows among ``keys`` (hexadecimal sha256s)."""
        missing = set(keys) - self._rows.keys()
        if missing and self._folder.is_dir():
            for file in sorted(self._folder.glob("*.safetensors")):
                self._read(file, missing)
        return {key: self._rows[key] for key in keys if key in self._rows}

    def add(self, key: str, row: NDArray[Any]) -> None:
        """Add a row. It is written to disk when a file is full, or by ``flush``."""
        self._rows[key] = self._pending[key] = row
        if len(self._pending) >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows to disk, then prune the cache to its size limit."""
        if not self._pending:
            return
        keys = np.frombuffer(bytes.fromhex("".join(self._pending)), dtype=np.uint8).reshape(-1, 32)
        rows = np.stack(list(self._pending.values()))
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "context.json").exists():
            atomic_write_text(self._folder / "context.json", self._context + "\n")
        with atomic_write(self._folder / f"{uuid.uuid4().hex}.safetensors") as temporary:
            temporary.write_bytes(save({"keys": keys, "rows": rows}, {"crc32": str(_checksum(keys, rows))}))
        self._pending.clear()
        prune(self._root, self._limit_bytes)

    def _read(self, file: Path, missing: set[str]) -> None:
        try:
            data = file.read_bytes()
            arrays = load(data)
            keys, rows = arrays["keys"], arrays["rows"]
            if _metadata(data).get("crc32") != str(_checksum(keys, rows)):
                raise ValueError("checksum")
        except FileNotFoundError:  # pruned by another run
            return
        except (SafetensorError, KeyError, ValueError):
            file.unlink(missing_ok=True)
            return
        matches = [(key, row) for key, row in zip((bytes(k).hex() for k in keys), rows, strict=True) if key in missing]
        self._rows.update(matches)
        if matches:
            with contextlib.suppress(OSError):
                os.utime(file)  # marks the file as recently used


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
