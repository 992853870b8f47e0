"""Create output folders atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.errors import DataError


def require_empty_folder(out: Path) -> None:
    """Raise DataError if ``out`` exists and is not an empty folder."""
    try:
        is_full = out.is_dir() and any(out.iterdir())
    except OSError as error:
        raise DataError(f"Could not read {out} ({error.strerror or error}). Choose another folder.") from error
    if is_full:
        raise DataError(f"The folder {out} is not empty. Choose another folder, or delete it first.")
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise DataError(f"{out} exists and is not a folder. Choose another name.")


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``out`` that is renamed to ``out`` if the block succeeds.

    A kill or a full disk leaves no incomplete ``out``. Parent folders are created.

    Raises:
        DataError: ``out`` exists and is not an empty folder, or an OSError occurred in the block.
    """
    temporary: Path | None = None
    try:
        require_empty_folder(out)
        target = Path(os.path.abspath(out))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        temporary.chmod(0o755)  # mkdtemp creates 0700, but other users may read datasets
        yield temporary
        if target.is_dir():
            target.rmdir()  # empty, as checked above; Windows cannot replace a folder
        temporary.replace(target)
    except OSError as error:
        raise DataError(
            f"Could not write to {out} ({error.strerror or error}). Free some space, or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
