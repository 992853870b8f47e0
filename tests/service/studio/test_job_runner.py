"""The runner, with small commands in place of trainings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.db.connection import Database
from service.db.training_jobs import TrainingJob, cancel_job, claim_job, get_job, submit_job
from service.settings import Settings
from service.studio import job_runner
from service.studio.job_files import JobFiles
from service.studio.job_runner import JobRunner
from tests.conftest import NewDatabase
from tests.helpers.databases import free_port
from tests.helpers.server import environment, is_running, poll

WAIT = "print('waiting', flush=True); import time; time.sleep(600)"
IGNORES_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"


class Queue:
    """A database, a studio and a runner whose trainings run ``script``."""

    def __init__(self, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings(studio=True, studio_dir=folder, studio_niceness=0)
        (folder / "datasets" / "pets").mkdir(parents=True)
        self.database = Database(url)
        self.script = "pass"
        self.starts: list[str] = []
        monkeypatch.setattr(job_runner, "training_command", lambda settings, **paths: self._command("start"))
        monkeypatch.setattr(job_runner, "resume_command", lambda run, progress: self._command("resume"))
        self.runner = JobRunner(self.settings, self.database)

    def _command(self, kind: str) -> list[str]:
        self.starts.append(kind)
        return [sys.executable, "-c", self.script]

    def submit(self, run: str = "a") -> int:
        with self.database.write() as connection:
            return submit_job(connection, run=run, settings={}, data="dataset:pets", reviews=0, actor="", max_queued=9)

    def job(self, id_: int) -> TrainingJob:
        with self.database.read() as connection:
            return get_job(connection, id_)

    def files(self, id_: int) -> JobFiles:
        return JobFiles.of(self.settings, self.job(id_))

    def step_until(self, id_: int, state: str) -> TrainingJob:
        def is_reached() -> bool:
            self.runner.step()
            return self.job(id_).state == state

        poll(is_reached)
        return self.job(id_)

    def step_until_output(self, id_: int, text: str = "waiting") -> int:
        """Wait until the training prints ``text``, and return its process id."""

        def has_printed() -> bool:
            self.runner.step()
            return text in self.files(id_).read_log()

        poll(has_printed)
        return self.runner._running[id_].process.pid


@pytest.fixture
def queue(tmp_path: Path, new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    with new_database("sqlite") as url:
        made = Queue(url, tmp_path / "studio", monkeypatch)
        yield made
        made.runner.close()
        made.database.close()


def test_a_training_that_fails_has_the_reason_of_its_log(queue: Queue) -> None:
    queue.script = "import sys; print('step'); print('finetune: No photos in data.', file=sys.stderr); sys.exit(2)"
    id_ = queue.submit()
    failed = queue.step_until(id_, "failed")
    assert failed.reason == "No photos in data."
    assert "step" in queue.files(id_).read_log()
    assert queue.starts == ["start"]


def test_a_training_that_is_killed_resumes_and_gives_up_after_several_times(queue: Queue) -> None:
    queue.script = WAIT
    id_ = queue.submit()
    for number in range(5):
        os.kill(queue.step_until_output(id_, "waiting\n" * (number + 1)), signal.SIGKILL)
        queue.files(id_).run.mkdir(parents=True, exist_ok=True)
        (queue.files(id_).run / "config.yaml").touch()  # from now on there is a run to resume
    failed = queue.step_until(id_, "failed")
    assert failed.reason == (
        "Its process was ended by SIGKILL. That can mean that the machine ran out of memory. The training was interrupted 5 "
        "times and was not resumed again. The last lines of its log may say why."
    )
    assert queue.starts == ["start", *["resume"] * 4]


def test_a_run_that_was_not_completely_created_starts_again(queue: Queue) -> None:
    queue.script = WAIT
    id_ = queue.submit()
    pid = queue.step_until_output(id_)
    queue.files(id_).run.mkdir(parents=True)
    (queue.files(id_).run / ".config.yaml.1.part").touch()
    os.kill(pid, signal.SIGKILL)
    queue.step_until_output(id_, "waiting\n" * 2)
    assert queue.starts == ["start", "start"]
    assert not queue.files(id_).run.exists()


def test_a_cancelled_training_ends_with_its_whole_process_group(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "STOP_S", 0.2)
    queue.script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IGNORES_SIGTERM!r}]).wait()"
    id_ = queue.submit()
    group = queue.step_until_output(id_)
    with queue.database.write() as connection:
        cancel_job(connection, id_)
    queue.step_until(id_, "cancelled")
    poll(lambda: not _group_exists(group))


def test_the_trainings_of_a_runner_that_ends_return_to_the_queue(queue: Queue) -> None:
    queue.script = WAIT
    id_ = queue.submit()
    pid = queue.step_until_output(id_)
    queue.runner.close()
    assert not _group_exists(pid)
    released = queue.job(id_)
    assert (released.state, released.interruptions) == ("queued", 0)


def test_a_training_that_another_runner_has_taken_over_is_stopped(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.script = WAIT
    id_ = queue.submit()
    pid = queue.step_until_output(id_)
    monkeypatch.setattr("service.db.training_jobs.LEASE_S", -1.0)
    monkeypatch.setattr(job_runner, "RENEW_S", 0.0)
    queue.runner.step()  # renews the lease, which has ended at once
    monkeypatch.setattr("service.db.training_jobs.LEASE_S", 60.0)
    with queue.database.write() as connection:
        assert claim_job(connection, "another", max_running=1)

    def is_stopped() -> bool:
        queue.runner.step()
        return not queue.runner._running

    poll(is_stopped)
    assert not _group_exists(pid)
    assert queue.job(id_).state == "running"  # by the other one


def test_data_that_was_moved_since_is_a_reason(queue: Queue) -> None:
    id_ = queue.submit()
    (queue.settings.resolved_studio_dir / "datasets" / "pets").rmdir()
    failed = queue.step_until(id_, "failed")
    assert failed.reason == "The training could not be started: Data: there is no folder 'pets' in the studio."


def test_a_training_has_the_lowest_priority_and_no_keys(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "secret-key")
    queue.runner._settings = replace(queue.settings, studio_niceness=19, studio_cpus=1)
    queue.script = (
        "import os; print('niceness', os.getpriority(os.PRIO_PROCESS, 0)); print('secret-key' in os.environ.values());"
        "print(len(os.sched_getaffinity(0)), 'CPU'); from pathlib import Path; group = Path('/proc/self/autogroup');"
        "print(group.read_text().split()[-1] if group.exists() else 19, flush=True);" + WAIT
    )
    id_ = queue.submit()
    queue.step_until_output(id_)
    assert queue.files(id_).read_log() == "niceness 19\nFalse\n1 CPU\n19\nwaiting\n"


def test_the_runner_ends_when_the_service_does(queue: Queue) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    queue.runner.run(reading)
    os.close(reading)


def test_a_database_that_is_down_is_logged() -> None:
    settings = {"database_url": f"postgresql://tester@127.0.0.1:{free_port()}/reviews", "studio": 1}
    ended = subprocess.run(
        [sys.executable, "-m", "service.studio.job_runner"],
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert json.loads(line)["message"] == "the queue of trainings is not available"


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return is_running(group)
