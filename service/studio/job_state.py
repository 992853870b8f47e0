"""What pages and programs are shown of a training: its row, its progress, and the figures of its bundle."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.paths import resolve_bundle
from models.errors import UserError
from service.context import services
from service.db.training_jobs import FINISHED, RUNNING, TrainingJob
from service.settings import Settings
from service.studio.curves import Curve, curve
from service.studio.data_source import describe_data
from service.studio.job_files import JobFiles
from service.studio.job_progress import JobProgress, ProgressReader

MAX_EPOCHS_IN_JSON = 1000
METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "roc_auc": "ROC AUC",
    "log_loss": "Log loss",
    "calibration_error": "Calibration error",
}
STATES = {
    "queued": "Waiting",
    "running": "Running",
    "finished": "Finished",
    "failed": "Failed",
    "cancelled": "Canceled",
}
_reader = ProgressReader()


@dataclass(frozen=True)
class JobState:
    """A training with its progress.

    Attributes:
        bundle: The bundle of a finished one.
        is_live: Whether its model is live.
        ahead: Number of jobs that run or wait before it.
        estimated_s: How long it will probably take from its start to its end, if that is known.
    """

    job: TrainingJob
    files: JobFiles
    progress: JobProgress
    bundle: Bundle | None
    is_live: bool
    ahead: int = 0
    estimated_s: float | None = None

    @classmethod
    def of(
        cls,
        settings: Settings,
        job: TrainingJob,
        *,
        live_version: str | None,
        ahead: int = 0,
        estimated_s: float | None = None,
    ) -> JobState:
        """Read the files of a job.

        Args:
            settings: The settings of the service.
            job: The job.
            live_version: The version of the active bundle.
            ahead: Number of jobs that run or wait before it.
            estimated_s: How long it will probably take.
        """
        files = JobFiles.of(settings, job)
        bundle = None
        if job.state == FINISHED:
            with contextlib.suppress(UserError, OSError):
                bundle = open_bundle(resolve_bundle(files.bundle), files=())
        is_live = job.version is not None and job.version == live_version
        return cls(job, files, _reader.read(files.progress), bundle, is_live, ahead, estimated_s)

    @property
    def title(self) -> str:
        """The state in a word."""
        if self.job.is_cancelled and self.job.is_active:
            return "Stopping"
        return STATES[self.job.state]

    @property
    def data(self) -> str:
        return describe_data(self.job.data)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of a finished training with their intervals."""
        metrics = self.bundle.manifest.get("metrics", {}) if self.bundle else {}
        return {name: metrics[name] for name in METRICS if isinstance(metrics.get(name), dict)}

    @property
    def curves(self) -> list[Curve]:
        """The curves of loss and accuracy."""
        rows, epochs = self.progress.history, self.progress.epochs
        return [curve("Loss", rows, "loss", epochs=epochs), curve("Accuracy", rows, "accuracy", epochs=epochs)]

    @property
    def last_epoch(self) -> dict[str, Any]:
        """The last epoch, which lists the photos whose prediction it changed."""
        return self.progress.history[-1] if self.progress.history else {}

    @property
    def seconds_left(self) -> float | None:
        """How long the run will probably still take, or None: it was interrupted, or takes longer than estimated."""
        job = self.job
        if self.estimated_s is None or job.state != RUNNING or job.started_at is None or job.reason is not None:
            return None
        left = self.estimated_s - (datetime.now(timezone.utc) - job.started_at).total_seconds()
        return max(left, self.progress.seconds_left or 0.0) if left > 0 else None

    @property
    def tag(self) -> str:
        """A text that changes when the state does."""
        job = self.job
        return f"{job.state}-{job.is_cancelled:d}-{job.interruptions}-{self.progress.events}-{self.ahead}-{self.is_live:d}"

    def to_json(self) -> dict[str, Any]:
        """Return the state for programs."""
        job, progress = self.job, self.progress
        return {
            "id": job.id,
            "run": job.run,
            "state": job.state,
            "is_cancelled": job.is_cancelled,
            "ahead": self.ahead,
            "data": job.data,
            "settings": job.settings,
            "reviews": job.reviews,
            "actor": job.actor,
            "created_at": _time(job.created_at),
            "started_at": _time(job.started_at),
            "ended_at": _time(job.ended_at),
            "interruptions": job.interruptions,
            "reason": job.reason,
            "version": job.version,
            "is_live": self.is_live,
            "seconds_left": self.seconds_left,
            "metrics": self.metrics,
            "progress": {
                "step": progress.step,
                "done": progress.done,
                "total": progress.total,
                "epoch": progress.epoch,
                "epochs": progress.epochs,
                "images_per_second": progress.images_per_second,
                "seconds_left": progress.seconds_left if job.is_active else None,
                "history": [_public(row) for row in progress.history[-MAX_EPOCHS_IN_JSON:]],
                "changed": self.last_epoch.get("changed", []),
                "changed_count": self.last_epoch.get("changed_count"),
            },
        }


def live_version() -> str | None:
    """Return the version of the bundle that is live in all workers."""
    active = services().rollout.store.read().active
    return active.version if active else None


def count_ahead(jobs: list[TrainingJob], job: TrainingJob) -> int:
    """Return how many of the active ``jobs`` come before a waiting one."""
    if job.state != "queued":
        return 0
    return sum(other.state == "running" or other.id < job.id for other in jobs if other.id != job.id)


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("time", "event", "changed", "changed_count", "epochs")}


def _time(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="seconds") if moment else None
