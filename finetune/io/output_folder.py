"""Dataset folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.errors import DataError


def require_empty_folder(out: Path) -> None:
    """Raise ``DataError`` where something is at ``out`` already; an empty folder counts as nothing."""
    try:
        full = out.is_dir() and any(out.iterdir())
    except OSError as error:
        raise DataError(f"Could not look into {out} ({error.strerror or error}); pick another folder.") from error
    if full:
        raise DataError(f"The folder {out} is not empty; pick another folder, or delete it first.")
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise DataError(f"{out} is not a folder, where a new one was wanted; pick another name.")


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` to fill, and rename it to ``out`` when the block ends without an error.

    A kill or a full disk in the middle leaves no ``out``. Parent folders are made.

    Raises ``DataError`` where something is at ``out`` already, and for every ``OSError`` inside the block.
    """
    part: Path | None = None
    try:
        require_empty_folder(out)
        home = Path(os.path.abspath(out))
        home.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{home.name}.", suffix=".part", dir=home.parent))
        part.chmod(0o755)  # mkdtemp gives 0700; a dataset is read by other users too
        yield part
        if home.is_dir():
            home.rmdir()  # empty, or it would have been refused; Windows renames onto nothing else
        part.replace(home)
    except OSError as error:
        raise DataError(f"Could not write to {out} ({error.strerror or error}); make room, or pick another folder.") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
