"""The studio's folder: datasets as ordinary image folders, training runs, and unfinished uploads.

STUDIO_DIR/
  datasets/NAME/CLASS/       or NAME/SPLIT/CLASS/, as every command of ``finetune`` reads it
  datasets/NAME.unlabeled/   photos without a class
  datasets/NAME.left-out/    photos that were left out, under their path in the dataset
  runs/NAME/                 what ``finetune train`` writes
  jobs/ID/                   log, progress and reviews of a training
  live.json                  the bundle that was put live (service/rollout/state.py)
  state/                     what the studio knows of a dataset: changes to undo, audits
  uploads/                   files that are being received; safe to delete while the server is stopped
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from service.http.errors import Problem
from service.settings import MIB, Settings

ABANDONED_AFTER_S = 7 * 24 * 3600


def try_lock(path: Path) -> int | None:
    """Lock a file until the returned descriptor is closed. Returns None if it is locked already."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@dataclass(frozen=True)
class Workspace:
    """The folders of the studio, which exist."""

    root: Path
    min_free_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Workspace:
        """Create the folders of STUDIO_DIR."""
        workspace = cls(settings.resolved_studio_dir, int(settings.studio_min_free_mb * MIB))
        for folder in (workspace.datasets, workspace.runs, workspace.state, workspace.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        workspace.remove_abandoned_uploads()
        return workspace

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    def dataset_names(self) -> list[str]:
        """Return the names of the datasets, sorted. A folder with a dot in its name belongs to one of them."""
        entries = [entry for entry in self.datasets.iterdir() if entry.is_dir() and "." not in entry.name]
        return sorted((entry.name for entry in entries), key=str.casefold)

    def remove_abandoned_uploads(self) -> None:
        """Delete what a server that was killed left in the folder of uploads, and zips that were not continued."""
        for entry in self.uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker deletes it as well
                if time.time() - entry.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def require_space(self, size: int) -> None:
        """Raise Problem if ``size`` more bytes would leave less than STUDIO_MIN_FREE_MB on the disk."""
        free = shutil.disk_usage(self.root).free
        if free - size < self.min_free_bytes:
            raise Problem(
                "storage_full",
                f"The server's disk has {free // MIB:,} MB left, and {self.min_free_bytes // MIB:,} MB stay free. Delete a "
                "dataset or a run, or ask the administrator for more space.",
            )
