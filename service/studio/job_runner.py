"""The process that runs the trainings of the queue: ``python -m service.studio.job_runner``.

``service.studio.runner_supervisor`` starts it. It ends with the service: standard input is a pipe whose other end every
process of the service holds. A training that it has to stop returns to the queue and resumes; a training whose runner was
killed dies with it and is taken over by the next runner when its lease ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.config
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from models.artifacts.bundle import open_bundle
from models.artifacts.paths import default_data_dir, resolve_bundle
from models.errors import ConfigError, UserError
from service.db.connection import Database
from service.db.training_jobs import (
    CANCELLED,
    FAILED,
    FINISHED,
    LEASE_S,
    TrainingJob,
    claim_job,
    count_interruption,
    end_job,
    forget_interruptions,
    list_jobs,
    release_job,
    renew_leases,
)
from service.settings import Settings
from service.studio.data_source import resolve_data
from service.studio.finetune_process import environment
from service.studio.job_files import JobFiles
from service.studio.job_progress import ProgressReader
from service.studio.training_settings import resume_command, training_command
from service.telemetry.json_logging import is_terminal, logging_config

log = logging.getLogger("service.studio")
POLL_S = 0.5
RENEW_S = LEASE_S / 5
GIVE_UP_S = LEASE_S * 2 / 3  # a training whose lease could not be renewed for so long is stopped, before another runner has it
STOP_S = 10.0  # time between SIGTERM and SIGKILL
AUTOGROUP = Path("/proc/self/autogroup")  # of the session, see sched(7)
PR_SET_PDEATHSIG = 1  # value in linux/prctl.h
LIBC = ctypes.CDLL(None)


@dataclass
class _Training:
    """A running training. ``first_epoch`` is the number of epochs when it was started or resumed."""

    job: TrainingJob
    files: JobFiles
    process: subprocess.Popen[bytes]
    is_cancelled: bool = False
    is_lost: bool = False
    first_epoch: int = 0
    stopped_at: float | None = None

    def stop(self) -> None:
        """Send SIGTERM to its process group, and SIGKILL if it still runs after STOP_S."""
        now = time.monotonic()
        if self.stopped_at is None:
            self.stopped_at = now
            self._signal(signal.SIGTERM)
        elif now - self.stopped_at > STOP_S:
            self._signal(signal.SIGKILL)

    def has_ended(self) -> bool:
        """Return whether the training has ended, and end what it left of its process group."""
        if self.process.poll() is None:
            return False
        self._signal(signal.SIGKILL)
        return True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class JobRunner:
    """Claims trainings, runs them and records how they end.

    Args:
        settings: The settings of the service.
        database: Its database.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._name = f"{socket.gethostname()[:40]}-{os.getpid()}-{time.time_ns() % 10**9}"
        self._running: dict[int, _Training] = {}
        self._renewed_at = time.monotonic()
        self._progress = ProgressReader()

    def run(self, lifeline: int) -> None:
        """Run trainings until ``lifeline``, the reading end of a pipe, is closed at its other end."""
        while not _is_closed(lifeline, within_s=POLL_S):
            self.step()
        self.close()

    def step(self) -> None:
        """Update the running trainings, and start the next one if there is room."""
        try:
            self._renew()
            for training in list(self._running.values()):
                if training.has_ended():
                    self._finish(training)
                    del self._running[training.job.id]
                elif training.is_cancelled or training.is_lost:
                    training.stop()
            if len(self._running) < self._settings.studio_max_running:
                self._start_next()
        except UserError as error:  # the database is not available
            log.warning("the queue of trainings is not available", extra={"reason": str(error)})
            if time.monotonic() - self._renewed_at > GIVE_UP_S:
                for training in self._running.values():
                    training.is_lost = True
                    training.stop()

    def close(self) -> None:
        """Stop all trainings and return them to the queue."""
        while running := [training for training in self._running.values() if not training.has_ended()]:
            for training in running:
                training.stop()
            time.sleep(POLL_S / 5)
        for training in self._running.values():
            with contextlib.suppress(UserError):
                if training.process.returncode < 0 and not training.is_lost and not training.is_cancelled:
                    with self._database.write() as connection:
                        release_job(connection, training.job.id, self._name)
                else:
                    self._finish(training)
        self._running.clear()

    def _renew(self) -> None:
        """Extend the leases, and notice cancelled trainings and ones that another runner has taken over."""
        if not self._running:
            self._renewed_at = time.monotonic()
            return
        if time.monotonic() - self._renewed_at > RENEW_S:
            with self._database.write() as connection:
                own = renew_leases(connection, self._name)
            self._renewed_at = time.monotonic()
        else:
            with self._database.read() as connection:
                own = list_jobs(connection, runner=self._name)
        by_id = {job.id: job for job in own}
        for id_, training in self._running.items():
            training.is_lost = id_ not in by_id
            training.is_cancelled = not training.is_lost and by_id[id_].is_cancelled
            if id_ in by_id and by_id[id_].interruptions and self._epoch(training.files) > training.first_epoch:
                with self._database.write() as connection:
                    forget_interruptions(connection, id_)  # it makes progress

    def _start_next(self) -> None:
        with self._database.read() as connection:  # a write transaction would wait for other writers, twice a second
            if not list_jobs(connection, "queued", "running"):
                return
        with self._database.write() as connection:
            job = claim_job(connection, self._name, max_running=self._settings.studio_max_running)
        if job:
            self._start(job)

    def _start(self, job: TrainingJob) -> None:
        files = JobFiles.of(self._settings, job)
        try:
            files.folder.mkdir(parents=True, exist_ok=True)
            data_dir = resolve_data(self._settings, job.data)  # a link may lead elsewhere since
            if files.is_started():
                command = resume_command(files.run, files.progress)
            else:
                command = training_command(
                    job.settings,
                    run=job.run,
                    data_dir=data_dir,
                    output_dir=files.run,
                    reviews=files.reviews if job.reviews else None,
                    progress_file=files.progress,
                )
            with files.log.open("ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=_environment(self._settings),
                    start_new_session=True,
                    preexec_fn=partial(_prepare_child, self._settings, parent=os.getpid()),
                )
        except (OSError, ConfigError) as error:
            reason = f"The training could not be started: {getattr(error, 'strerror', None) or error}"
            with self._database.write() as connection:
                end_job(connection, job.id, FAILED, reason=reason)
            log.error("a training could not be started", extra={"job": job.id, "reason": reason})
            return
        self._running[job.id] = _Training(job, files, process, first_epoch=self._epoch(files))
        log.info("a training was started", extra={"job": job.id, "run": job.run, "pid": process.pid})

    def _finish(self, training: _Training) -> None:
        """Record the end of a training. One that was killed starts again. Raises DatabaseUnavailableError."""
        job, code = training.job, training.process.returncode
        log.info("a training ended", extra={"job": job.id, "run": job.run, "code": code})
        if training.is_lost:
            return
        if code == 0:
            self._record_success(training)
            return
        with self._database.write() as connection:
            if training.is_cancelled:
                end_job(connection, job.id, CANCELLED)
            elif code > 0:
                end_job(connection, job.id, FAILED, reason=training.files.last_error() or f"It ended with the code {code}.")
            else:
                reason = f"Its process was ended by {_signal_name(-code)}."
                if code == -signal.SIGKILL:
                    reason += " That can mean that the machine ran out of memory."
                if count_interruption(connection, job.id, reason):
                    release_job(connection, job.id, self._name, reason=reason)

    def _epoch(self, files: JobFiles) -> int:
        return self._progress.read(files.progress).epoch

    def _record_success(self, training: _Training) -> None:
        """Import the predictions of the bundle into the gallery, and record its version."""
        from service.gallery.index import GalleryIndex

        job, files = training.job, training.files
        try:
            path = resolve_bundle(files.bundle)
            version = open_bundle(path, files=()).version
        except UserError as error:
            with self._database.write() as connection:
                end_job(connection, job.id, FAILED, reason=str(error))
            return
        GalleryIndex(self._settings, self._database).add(path)
        assert job.started_at is not None
        speed = self._progress.read(files.progress).speed((datetime.now(timezone.utc) - job.started_at).total_seconds())
        with self._database.write() as connection:
            is_measured = job.interruptions == 0 and job.reason is None
            end_job(connection, job.id, FINISHED, version=version, speed=speed if is_measured else None)


def main() -> None:
    """Run the trainings of this machine's studio."""
    settings = Settings.from_environment()
    logging.config.dictConfig(logging_config(settings.log_level, terminal=is_terminal()))
    url = settings.database_url or f"sqlite:///{default_data_dir() / 'reviews.db'}"
    try:
        database = Database(url, timeout_s=settings.database_timeout_s)
    except UserError as error:
        log.error("the queue of trainings is not available", extra={"reason": str(error)})
        raise SystemExit(1) from None  # the supervisor starts it again
    JobRunner(settings, database).run(sys.stdin.fileno())


def _is_closed(lifeline: int, *, within_s: float) -> bool:
    """Wait for the other end of a pipe to be closed. Nothing is ever written to it."""
    return bool(select.select([lifeline], [], [], within_s)[0]) and not os.read(lifeline, 1)


def _environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a training, without the keys of the service."""
    threads = {"OMP_NUM_THREADS": str(settings.studio_cpus)} if settings.studio_cpus else {}
    return environment() | threads | {"PYTHONUNBUFFERED": "1"}


def _prepare_child(settings: Settings, *, parent: int) -> None:
    """Lower the priority of a training, limit its CPUs, and have it end with the runner. Runs in the child before it starts."""
    with contextlib.suppress(AttributeError):  # Linux only
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the runner ended before the line above
    niceness = max(settings.studio_niceness, os.getpriority(os.PRIO_PROCESS, 0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    with contextlib.suppress(OSError):  # Linux may divide the CPUs between sessions first, each with a niceness of its own
        AUTOGROUP.write_text(str(niceness))
    if settings.studio_cpus and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-settings.studio_cpus :])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    main()
