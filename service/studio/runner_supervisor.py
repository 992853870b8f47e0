"""Keep one process running that runs the trainings (``service.studio.job_runner``), however many workers there are.

Each worker tries to lock a file of STUDIO_DIR, and the one that succeeds starts the process, which inherits the lock. If it
ends, another worker gets the lock. The process does not depend on the worker that started it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

from service.settings import Settings
from service.studio.workspace import try_lock

log = logging.getLogger("service.studio")
LOCK = "runner.lock"
POLL_S = 2.0
RESTART_S = 10.0  # pause between two starts by the same worker
END_S = 15.0  # time for the runner to stop a training run

_lifeline: tuple[int, int] | None = None


def share_lifeline() -> None:
    """Create the pipe that the runner reads. It is closed when this process and the workers that it forks have ended."""
    global _lifeline
    _lifeline = _lifeline or os.pipe()


def supervise(settings: Settings, closed: threading.Event) -> None:
    """Start a runner whenever there is none, in a thread, until ``closed`` is set.

    Only gunicorn's workers do, as the runner reads the settings of the environment.
    """
    if _lifeline is None:
        return
    threading.Thread(target=_supervise, args=(settings, closed), name="training-runner", daemon=True).start()


def end_runner(settings: Settings) -> None:
    """End the runner as the service ends, and wait until its training has returned to the queue."""
    global _lifeline
    if _lifeline is None:
        return
    for descriptor in _lifeline:
        os.close(descriptor)
    _lifeline = None
    until = time.monotonic() + END_S
    while time.monotonic() < until and (lock := try_lock(settings.resolved_studio_dir / LOCK)) is None:
        time.sleep(POLL_S / 20)
    if lock is not None:
        os.close(lock)


def _supervise(settings: Settings, closed: threading.Event) -> None:
    children: list[subprocess.Popen[bytes]] = []
    pause_s = 0.0
    while not closed.wait(pause_s):
        pause_s = POLL_S
        children = [child for child in children if child.poll() is None]
        try:
            if (lock := try_lock(settings.resolved_studio_dir / LOCK)) is not None:
                children.append(_start(lock))
                pause_s = RESTART_S
        except OSError as error:
            log.error("the process that runs trainings could not be started", extra={"reason": str(error)})
            pause_s = RESTART_S


def _start(lock: int) -> subprocess.Popen[bytes]:
    """Start the runner, which keeps the lock as long as it lives."""
    assert _lifeline is not None
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "service.studio.job_runner"],
            stdin=_lifeline[0],
            stdout=subprocess.DEVNULL,
            pass_fds=[lock],
            start_new_session=True,
        )
    finally:
        os.close(lock)
