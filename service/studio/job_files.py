"""The files of a training: log, progress and reviews in ``STUDIO_DIR/jobs/ID``, and its run in ``STUDIO_DIR/runs/NAME``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from service.db.training_jobs import TrainingJob
from service.settings import Settings

MAX_LOG_BYTES = 256 << 10


@dataclass(frozen=True)
class JobFiles:
    """The paths of a training's files.

    Attributes:
        folder: The folder of the job.
        run: The run directory, which ``finetune train`` creates.
    """

    folder: Path
    run: Path

    @classmethod
    def of(cls, settings: Settings, job: TrainingJob) -> JobFiles:
        root = settings.resolved_studio_dir
        return cls(root / "jobs" / str(job.id), root / "runs" / job.run)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def progress(self) -> Path:
        return self.folder / "progress.jsonl"

    @property
    def reviews(self) -> Path:
        return self.folder / "reviews.csv"

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"

    def is_started(self) -> bool:
        """Return whether there is a run to resume. Remove what a training left that was killed while it created its folder."""
        if (self.run / "config.yaml").is_file():
            return True
        shutil.rmtree(self.run, ignore_errors=True)
        return False

    def read_log(self) -> str:
        """Return the last MAX_LOG_BYTES of the log, without control characters except line ends."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - MAX_LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return "".join(char for char in text if char == "\n" or char.isprintable())

    def last_error(self) -> str | None:
        """Return the last error message of the log, or its last line."""
        lines = [line.strip() for line in self.read_log().splitlines() if line.strip()]
        messages = [line.removeprefix("finetune: ") for line in lines if line.startswith("finetune: ")]
        found = messages or lines
        return found[-1] if found else None

    def delete(self) -> None:
        """Delete all files of the training."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
