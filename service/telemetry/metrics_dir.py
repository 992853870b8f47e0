"""The folder in which workers keep their metrics for each other.

gunicorn's parent process creates it before it forks. This module must not import prometheus_client, which decides at its
import whether metrics are shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

DIR_VARIABLE, DIR_PREFIX = "PROMETHEUS_MULTIPROC_DIR", "dogs-vs-cats-metrics-"
MIN_AGE_S = 60.0  # a younger folder may be one that another server is about to lock

_descriptor: int | None = None


def create_metrics_dir() -> Path:
    """Create the folder of the workers' metrics, and remove those of servers that were killed.

    The process and its workers keep a lock on the folder. It marks the folder as in use, and systemd-tmpfiles respects it.
    """
    global _descriptor
    parent = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    for folder in parent.glob(f"{DIR_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is another user's, or in use
            if time.time() - folder.stat().st_mtime >= MIN_AGE_S:
                os.close(_lock(folder))
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=DIR_PREFIX, dir=parent))
    _descriptor = _lock(folder)
    os.environ[DIR_VARIABLE] = str(folder)
    return folder


def restore_metrics_dir() -> None:
    """Create the folder again if something removed it."""
    global _descriptor
    folder = Path(os.environ[DIR_VARIABLE])
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        if _descriptor is not None:
            os.close(_descriptor)
        _descriptor = _lock(folder)


def remove_metrics_dir() -> None:
    """Remove the folder when the server ends."""
    shutil.rmtree(os.environ[DIR_VARIABLE], ignore_errors=True)


def _lock(folder: Path) -> int:
    """Lock a folder until its descriptor is closed. Raises OSError if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
