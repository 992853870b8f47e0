"""The queue of trainings, on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import update

from service.db.connection import Database
from service.db.errors import JobConflictError, JobQueueFullError, RecordNotFoundError
from service.db.schema import training_jobs
from service.db.training_jobs import (
    FAILED,
    FINISHED,
    MAX_INTERRUPTIONS,
    TAKEN_OVER,
    TrainingJob,
    cancel_job,
    claim_job,
    count_interruption,
    delete_job,
    end_job,
    find_run,
    forget_interruptions,
    get_job,
    list_jobs,
    release_job,
    renew_leases,
    resume_job,
    submit_job,
)


def submit(database: Database, run: str, *, max_queued: int = 10) -> int:
    with database.write() as connection:
        return submit_job(
            connection, run=run, settings={"epochs": 2}, data="dataset:pets", reviews=3, actor="ann", max_queued=max_queued
        )


def claim(database: Database, runner: str = "one", *, max_running: int = 1) -> TrainingJob | None:
    with database.write() as connection:
        return claim_job(connection, runner, max_running=max_running)


def job(database: Database, id_: int) -> TrainingJob:
    with database.read() as connection:
        return get_job(connection, id_)


def end_lease(database: Database, id_: int) -> None:
    """End the lease of a job, as after a kill of its runner."""
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    with database.write() as connection:
        connection.execute(update(training_jobs).where(training_jobs.c.id == id_).values(lease_until=past))


def test_jobs_run_one_after_the_other_in_their_order(database: Database) -> None:
    first, second = submit(database, "a"), submit(database, "b")
    claimed = claim(database)
    assert claimed
    assert (claimed.id, claimed.state, claimed.settings, claimed.reviews) == (first, "running", {"epochs": 2}, 3)
    assert claimed.started_at is not None
    assert claim(database) is None
    assert claim(database, "two") is None
    with database.write() as connection:
        end_job(connection, first, FINISHED, version="abc", speed={"other_s": 1.5})
    done = job(database, first)
    assert (done.state, done.version, done.speed) == ("finished", "abc", {"other_s": 1.5})
    following = claim(database, "two")
    assert following
    assert following.id == second


def test_several_jobs_run_at_a_time_if_that_is_allowed(database: Database) -> None:
    ids = [submit(database, name) for name in "abc"]
    claimed = [claim(database, runner, max_running=2) for runner in ("one", "two", "three")]
    assert [row and row.id for row in claimed] == [*ids[:2], None]


def test_the_queue_is_bounded_and_names_are_unique(database: Database) -> None:
    submit(database, "a", max_queued=1)
    with pytest.raises(
        JobQueueFullError, match=r"^The queue is full: STUDIO_MAX_QUEUED is 1\. Cancel a waiting run, or wait\.$"
    ):
        submit(database, "b", max_queued=1)
    with pytest.raises(JobConflictError, match=r"^There is already a run with the name a\. Choose another name\.$"):
        submit(database, "a")


def test_a_job_whose_runner_has_disappeared_is_taken_over_before_others(database: Database) -> None:
    first, _ = submit(database, "a"), submit(database, "b")
    assert claim(database)
    end_lease(database, first)
    taken = claim(database, "two")
    assert taken
    assert (taken.id, taken.interruptions, taken.reason) == (first, 1, TAKEN_OVER)
    with database.write() as connection:
        assert renew_leases(connection, "one") == []
        assert [row.id for row in renew_leases(connection, "two")] == [first]
    assert claim(database, "one") is None  # the lease holds again


def test_a_job_that_is_interrupted_again_and_again_fails_unless_it_makes_progress(database: Database) -> None:
    id_ = submit(database, "a")
    for _ in range(MAX_INTERRUPTIONS):
        assert claim(database)
        end_lease(database, id_)
    assert claim(database) is None
    failed = job(database, id_)
    assert failed.state == "failed"
    assert failed.reason == (
        "The training was interrupted 5 times and was not resumed again. The last lines of its log may say why."
    )
    with database.write() as connection:
        resume_job(connection, id_, max_queued=1)
    assert claim(database)
    with database.write() as connection:
        assert all(count_interruption(connection, id_, "Killed.") for _ in range(MAX_INTERRUPTIONS - 1))
        forget_interruptions(connection, id_)
        assert count_interruption(connection, id_, "Killed.")
    assert job(database, id_).interruptions == 1


def test_a_released_job_waits_before_those_that_never_ran(database: Database) -> None:
    first, _ = submit(database, "a"), submit(database, "b")
    assert claim(database)
    with database.write() as connection:
        release_job(connection, first, "another")  # not its own
    assert job(database, first).state == "running"
    with database.write() as connection:
        release_job(connection, first, "one")
    released = job(database, first)
    assert (released.state, released.reason, released.interruptions) == ("queued", "The server was stopped while it ran.", 0)
    taken = claim(database, "two")
    assert taken
    assert taken.id == first


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_runner(database: Database) -> None:
    first, second = submit(database, "a"), submit(database, "b")
    assert claim(database)
    with database.write() as connection:
        cancel_job(connection, first)
        cancel_job(connection, second)
    assert (job(database, first).state, job(database, first).is_cancelled) == ("running", True)
    assert job(database, second).state == "cancelled"
    end_lease(database, first)
    assert claim(database, "two") is None  # its runner was killed before it stopped the training
    assert job(database, first).state == "cancelled"
    with (
        database.write() as connection,
        pytest.raises(JobConflictError, match=r"^The run a has ended and cannot be canceled\.$"),
    ):
        cancel_job(connection, first)


def test_only_ended_jobs_are_resumed_or_deleted(database: Database) -> None:
    id_ = submit(database, "a")
    with database.write() as connection:
        with pytest.raises(JobConflictError, match=r"^The run a cannot be resumed: it is queued\.$"):
            resume_job(connection, id_, max_queued=5)
        with pytest.raises(JobConflictError, match=r"^The run a is queued\. Cancel it first\.$"):
            delete_job(connection, id_)
        end_job(connection, id_, FAILED, reason="no photos")
        resume_job(connection, id_, max_queued=5)
    resumed = job(database, id_)
    assert (resumed.state, resumed.reason, resumed.ended_at) == ("queued", None, None)
    with database.write() as connection:
        end_job(connection, id_, FAILED)
        delete_job(connection, id_)
    with database.read() as connection:
        assert list_jobs(connection) == []
        with pytest.raises(RecordNotFoundError, match=r"^There is no training run \d+\.$"):
            get_job(connection, id_)
        with pytest.raises(RecordNotFoundError):
            get_job(connection, 10**30)
        with pytest.raises(RecordNotFoundError, match=r"^There is no run 'a'\.$"):
            find_run(connection, "a")
    assert submit(database, "a") != id_  # a page of the deleted run does not show another one
