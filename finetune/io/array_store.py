"""A content-addressed store of array rows on disk: written once, shared between runs, bounded, safe against a kill.

Rows of one kind (``context`` says what made them) lie in a folder named by the context's sha256, in files of some hundred
rows each: the rows, and the sha256 of what each row was made from. A file appears whole or not at all and never changes,
so several runs may read and write at once; a damaged one is left out and its rows are made again.
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
    """Rows by key, for one context. ``root`` is shared by all contexts and holds at most ``limit_mb`` after ``prune``."""

    def __init__(self, root: Path, context: Mapping[str, Any], *, limit_mb: int) -> None:
        text = json.dumps(context, sort_keys=True)
        self._root = root
        self._folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        self._context = text
        self._limit_bytes = limit_mb * 1_000_000
        self._pending: dict[str, NDArray[Any]] = {}
        self._rows: dict[str, NDArray[Any]] = {}

    def load(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The rows that are there for ``keys`` (sha256 in hexadecimal digits); those that are not are left out."""
        missing = set(keys) - self._rows.keys()
        if missing and self._folder.is_dir():
            for file in sorted(self._folder.glob("*.safetensors")):
                self._read(file, missing)
        return {key: self._rows[key] for key in keys if key in self._rows}

    def add(self, key: str, row: NDArray[Any]) -> None:
        """Keep a row; it is on disk after some hundred more, or after ``flush``."""
        self._rows[key] = self._pending[key] = row
        if len(self._pending) >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, then remove the files used longest ago while the whole store is over its limit."""
        if not self._pending:
            return
        keys = np.frombuffer(bytes.fromhex("".join(self._pending)), dtype=np.uint8).reshape(-1, 32)
        rows = np.stack(list(self._pending.values()))
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "context.json").exists():
            atomic_write_text(self._folder / "context.json", self._context + "\n")
        with atomic_write(self._folder / f"{uuid.uuid4().hex}.safetensors") as part:
            part.write_bytes(save({"keys": keys, "rows": rows}, {"crc32": str(_checksum(keys, rows))}))
        self._pending.clear()
        prune(self._root, self._limit_bytes)

    def _read(self, file: Path, wanted: set[str]) -> None:
        try:
            data = file.read_bytes()
            arrays = load(data)
            keys, rows = arrays["keys"], arrays["rows"]
            if _metadata(data).get("crc32") != str(_checksum(keys, rows)):
                raise ValueError("checksum")
        except FileNotFoundError:  # another run has pruned it
            return
        except (SafetensorError, KeyError, ValueError):
            file.unlink(missing_ok=True)
            return
        found = [(key, row) for key, row in zip((bytes(k).hex() for k in keys), rows, strict=True) if key in wanted]
        self._rows.update(found)
        if found:
            with contextlib.suppress(OSError):
                os.utime(file)


def prune(root: Path, limit_bytes: int) -> None:
    """Remove the files used longest ago until all that lie in ``root`` take at most ``limit_bytes``."""
    found = []
    for file in (*root.glob("*/*.safetensors"), *root.glob("*/.*.part")):  # a killed run leaves its part behind
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            found.append((stat.st_mtime_ns, stat.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= limit_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size


def _checksum(keys: NDArray[np.uint8], rows: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).tobytes(), zlib.crc32(keys.tobytes()))


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})
