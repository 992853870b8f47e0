"""The queue of training runs: submit, claim, cancel, resume and finish jobs.

A table with a lease serves as the queue on SQLite and PostgreSQL: a job is a process that resumes, so that nothing more is
needed than who runs it and until when. huey deletes a task before it runs, so that a killed one is lost, and procrastinate
needs PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, or_, select, update

from service.db.errors import JobConflictError, JobQueueFullError, RecordNotFoundError
from service.db.schema import training_jobs as jobs

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED = "queued", "running", "finished", "failed", "cancelled"
ACTIVE = (QUEUED, RUNNING)
MAX_ID = 2**63 - 1  # largest integer of both databases
LEASE_S = 15.0  # a job whose runner sends no sign for this time is taken over
MAX_INTERRUPTIONS = 5  # most interruptions without a finished epoch in between
INTERRUPTED = "The training was interrupted {} times and was not resumed again. The last lines of its log may say why."
STOPPED = "The server was stopped while it ran."
TAKEN_OVER = "Its process ended with the server. It was resumed."


@dataclass(frozen=True)
class TrainingJob:
    """A row of the table ``training_jobs``, whose columns ``service.db.schema`` describes."""

    id: int
    run: str
    state: str
    settings: dict[str, Any]
    data: str
    reviews: int
    actor: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    interruptions: int
    is_cancelled: bool
    reason: str | None
    version: str | None
    speed: dict[str, float] | None

    @property
    def is_active(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in ACTIVE


_COLUMNS = [jobs.c[field.name] for field in fields(TrainingJob)]


def submit_job(
    connection: Connection,
    *,
    run: str,
    settings: Mapping[str, Any],
    data: str,
    reviews: int,
    actor: str,
    max_queued: int,
) -> int:
    """Append a job to the queue.

    Args:
        connection: A write transaction.
        run: The folder of the run.
        settings: The settings of ``finetune train``.
        data: How the form names the data.
        reviews: Number of reviews that are applied.
        actor: Who started it.
        max_queued: Largest number of waiting jobs.

    Returns:
        The id of the job.

    Raises:
        JobQueueFullError: ``max_queued`` jobs wait.
        JobConflictError: There is a run with this name.
    """
    _require_room(connection, max_queued)
    if connection.execute(select(jobs.c.id).where(jobs.c.run == run)).first():
        raise JobConflictError(f"There is already a run with the name {run}. Choose another name.")
    values = {
        "run": run,
        "state": QUEUED,
        "settings": dict(settings),
        "data": data,
        "reviews": reviews,
        "actor": actor,
        "created_at": _now(),
        "interruptions": 0,
        "is_cancelled": False,
    }
    return int(connection.execute(insert(jobs).values(values)).inserted_primary_key[0])  # type: ignore[index]


def get_job(connection: Connection, id_: int) -> TrainingJob:
    """Return a job. Raises RecordNotFoundError."""
    row = connection.execute(select(*_COLUMNS).where(jobs.c.id == id_)).first() if id_ <= MAX_ID else None
    if row is None:
        raise RecordNotFoundError(f"There is no training run {id_}.")
    return TrainingJob(**row._mapping)


def find_run(connection: Connection, run: str) -> TrainingJob:
    """Return the job of a run. Raises RecordNotFoundError."""
    row = connection.execute(select(*_COLUMNS).where(jobs.c.run == run)).first()
    if row is None:
        raise RecordNotFoundError(f"There is no run {run!r}.")
    return TrainingJob(**row._mapping)


def list_jobs(connection: Connection, *states: str, runner: str | None = None) -> list[TrainingJob]:
    """List the jobs, newest first: all of them, the jobs in certain states, or the jobs of a runner."""
    rows = select(*_COLUMNS).order_by(jobs.c.id.desc())
    if states:
        rows = rows.where(jobs.c.state.in_(states))
    if runner:
        rows = rows.where(jobs.c.state == RUNNING, jobs.c.runner == runner)
    return [TrainingJob(**row._mapping) for row in connection.execute(rows)]


def claim_job(connection: Connection, runner: str, *, max_running: int) -> TrainingJob | None:
    """Take the next job: one whose runner has disappeared, else the one that has waited for longest.

    A job that was interrupted MAX_INTERRUPTIONS times fails instead.

    Args:
        connection: A write transaction.
        runner: The name of the runner, which has the job until its lease ends.
        max_running: Number of jobs that may run at a time.
    """
    now = _now()
    is_lost = and_(jobs.c.state == RUNNING, jobs.c.lease_until < now)
    running = select(func.count()).where(jobs.c.state == RUNNING, jobs.c.lease_until >= now)
    while connection.execute(running).scalar_one() < max_running:
        candidates = select(*_COLUMNS).where(or_(is_lost, jobs.c.state == QUEUED))
        row = connection.execute(candidates.order_by(jobs.c.state.desc(), jobs.c.id).limit(1)).first()
        if row is None:
            return None
        job = TrainingJob(**row._mapping)
        if job.is_cancelled:
            end_job(connection, job.id, CANCELLED)
        elif job.state == RUNNING and job.interruptions + 1 >= MAX_INTERRUPTIONS:
            end_job(connection, job.id, FAILED, reason=INTERRUPTED.format(job.interruptions + 1))
        else:
            values: dict[str, Any] = {"state": RUNNING, "runner": runner, "lease_until": _lease_end()}
            values["started_at"] = job.started_at or now
            if job.state == RUNNING:
                values |= {"interruptions": job.interruptions + 1, "reason": TAKEN_OVER}
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
            return get_job(connection, job.id)
    return None


def renew_leases(connection: Connection, runner: str) -> list[TrainingJob]:
    """Extend the leases of a runner, and return the jobs that it still has."""
    own = and_(jobs.c.state == RUNNING, jobs.c.runner == runner)
    connection.execute(update(jobs).where(own).values(lease_until=_lease_end()))
    return list_jobs(connection, runner=runner)


def release_job(connection: Connection, id_: int, runner: str, *, reason: str = STOPPED) -> None:
    """Return a job to the queue, before all jobs that have never run."""
    own = and_(jobs.c.id == id_, jobs.c.state == RUNNING, jobs.c.runner == runner)
    values = {"state": QUEUED, "runner": None, "lease_until": None, "reason": reason}
    connection.execute(update(jobs).where(own).values(values))


def count_interruption(connection: Connection, id_: int, reason: str) -> bool:
    """Record that the process of a job was killed. Returns whether to resume it; else the job has failed."""
    count = get_job(connection, id_).interruptions + 1
    if count >= MAX_INTERRUPTIONS:
        end_job(connection, id_, FAILED, reason=f"{reason} {INTERRUPTED.format(count)}")
        return False
    connection.execute(update(jobs).where(jobs.c.id == id_).values(interruptions=count, reason=reason))
    return True


def forget_interruptions(connection: Connection, id_: int) -> None:
    """Count the interruptions of a job from 0 again."""
    connection.execute(update(jobs).where(jobs.c.id == id_).values(interruptions=0))


def end_job(
    connection: Connection,
    id_: int,
    state: str,
    *,
    reason: str | None = None,
    version: str | None = None,
    speed: Mapping[str, float] | None = None,
) -> None:
    """Record the end of a job.

    Args:
        connection: A write transaction.
        id_: The job.
        state: FINISHED, FAILED or CANCELLED.
        reason: Why it failed.
        version: The version of the bundle.
        speed: Seconds of its phases.
    """
    values: dict[str, Any] = {"state": state, "reason": reason, "version": version, "speed": dict(speed) if speed else None}
    values |= {"ended_at": _now(), "runner": None, "lease_until": None}
    connection.execute(update(jobs).where(jobs.c.id == id_).values(values))


def cancel_job(connection: Connection, id_: int) -> None:
    """Cancel a waiting job, or have the runner of a running one stop it. Raises JobConflictError if it has ended."""
    job = get_job(connection, id_)
    if not job.is_active:
        raise JobConflictError(f"The run {job.run} has ended and cannot be canceled.")
    connection.execute(update(jobs).where(jobs.c.id == id_).values(is_cancelled=True))
    if job.state == QUEUED:
        end_job(connection, id_, CANCELLED)


def resume_job(connection: Connection, id_: int, *, max_queued: int) -> None:
    """Return a failed or canceled job to the queue. Raises JobConflictError and JobQueueFullError."""
    job = get_job(connection, id_)
    if job.state not in (FAILED, CANCELLED):
        raise JobConflictError(f"The run {job.run} cannot be resumed: it is {job.state}.")
    _require_room(connection, max_queued)
    values = {"state": QUEUED, "is_cancelled": False, "interruptions": 0, "reason": None, "ended_at": None}
    connection.execute(update(jobs).where(jobs.c.id == id_).values(values))


def delete_job(connection: Connection, id_: int) -> None:
    """Delete a job that has ended. Raises JobConflictError."""
    job = get_job(connection, id_)
    if job.is_active:
        raise JobConflictError(f"The run {job.run} is {job.state}. Cancel it first.")
    connection.execute(delete(jobs).where(jobs.c.id == id_))


def _require_room(connection: Connection, max_queued: int) -> None:
    waiting = connection.execute(select(func.count()).where(jobs.c.state == QUEUED)).scalar_one()
    if waiting >= max_queued:
        raise JobQueueFullError(f"The queue is full: STUDIO_MAX_QUEUED is {max_queued}. Cancel a waiting run, or wait.")


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _lease_end() -> datetime:
    return _now() + timedelta(seconds=LEASE_S)
