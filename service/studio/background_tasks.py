"""Run long work on a dataset in the background, one at a time, with a state that every worker of the server can read.

A thread of one worker does the work. It holds a file lock until its end, so that a worker that was killed leaves work that is
known to be interrupted.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.errors import UserError
from service.http.errors import Problem
from service.images.worker_pool import lower_priority
from service.studio.data_sets import DataSet
from service.studio.workspace import try_lock

RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"
REPORT_EVERY_S = 0.5
LOCK = "task.lock"

log = logging.getLogger("service.studio")


@dataclass(frozen=True)
class Task:
    """The last work on a dataset: what it is, how far it is, and a sentence about its result or failure."""

    kind: str
    state: str
    message: str = ""
    done: int = 0
    total: int = 0

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING


class Report:
    """Writes the state of running work, not more often than REPORT_EVERY_S."""

    def __init__(self, data_set: DataSet, kind: str) -> None:
        self._data_set, self._kind = data_set, kind
        self._next = 0.0

    def __call__(self, message: str, done: int = 0, total: int = 0) -> None:
        if time.monotonic() >= self._next or done == total:
            self._next = time.monotonic() + REPORT_EVERY_S
            self.write(Task(self._kind, RUNNING, message, done, total))

    def write(self, task: Task) -> None:
        self._data_set.write_state("task.json", task.__dict__)


def current_task(data_set: DataSet) -> Task | None:
    """Return the last work on a dataset, or None if there was none."""
    found: dict[str, Any] | None = data_set.read_state("task.json", None)
    if found is None:
        return None
    task = Task(**found)
    if task.is_running and (lock := try_lock(data_set.state_file(LOCK))) is not None:
        os.close(lock)
        task = Task(**(data_set.read_state("task.json", found)))  # it may have ended just before the lock was free
        return Task(task.kind, INTERRUPTED, "It was interrupted. Start it again.") if task.is_running else task
    return task


def start(data_set: DataSet, kind: str, work: Callable[[Report], str]) -> None:
    """Start work on a dataset.

    Args:
        data_set: The dataset.
        kind: What it is: "audit", "import" or "classification".
        work: Does the work and returns a sentence about the result. A UserError becomes its failure.

    Raises:
        Problem: Other work on the dataset is running.
    """
    lock = try_lock(data_set.state_file(LOCK))
    if lock is None:
        task = current_task(data_set)
        what = task.kind if task else "task"
        raise Problem("dataset_busy", f"The {what} of {data_set.name} is still running. Wait until it has finished.")
    report = Report(data_set, kind)
    report("Starting", total=-1)
    threading.Thread(target=_run, args=(lock, report, kind, work), name=f"studio-{kind}", daemon=True).start()


def _run(lock: int, report: Report, kind: str, work: Callable[[Report], str]) -> None:
    lower_priority()
    try:
        try:
            task = Task(kind, DONE, work(report))
        except UserError as error:
            task = Task(kind, FAILED, str(error))
        except Exception:
            log.exception("work of the studio failed", extra={"kind": kind})
            task = Task(kind, FAILED, "An unexpected error was logged. Report it to the server's operator.")
        report.write(task)
    finally:
        os.close(lock)
