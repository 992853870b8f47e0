"""Decode images in a child process that is limited in time and memory, and that can be killed.

``python -m service.inference.decoder_process`` is the child. It reads jobs from standard input and writes results to standard
output, as messages of ``multiprocessing.connection``: a JSON header, then bytes, in both directions. Its standard error is
discarded, as libtiff writes its own messages there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from models import errors
from models.errors import ImageError, TooComplexError
from service.inference.decoding import PLAIN_JOBS

IDLE_S = 30.0
START_S = 60.0
END_S = 1.0
BYTES_PER_PIXEL = 20  # the maximum that Pillow uses for any format while it decodes and converts
BODY_COPIES = 4
SLACK_BYTES = 128 << 20
READY = b"ready"
MAX_RESULT_BYTES = 256 << 20
INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")  # no variables with keys or passwords
ROOT = Path(__file__).resolve().parents[2]
ERRORS = {"ImageError", "UnsupportedImageError", "ImageTooLargeError", "TooComplexError"}


class DecoderBusyError(Exception):
    """The process was not free, or not done, within the time of the caller."""


class DecoderProcess:
    """A child process that runs one job at a time, for any number of threads. The first job starts it.

    Args:
        max_pixels: Largest image in pixels. With ``max_body_bytes`` it determines the child's memory limit.
        max_body_bytes: Largest file.
        timeout_s: The child is killed if a job takes longer.
        idle_s: The child ends itself after this time without a job, to free its memory.
        count: Called with the outcome of each job: "ok", "rejected", "timeout", "crash", or "cut" by the caller's time.
    """

    def __init__(
        self,
        *,
        max_pixels: int,
        max_body_bytes: int,
        timeout_s: float,
        idle_s: float = IDLE_S,
        count: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        self.timeout_s = timeout_s
        self._memory_bytes = max_pixels * BYTES_PER_PIXEL + max_body_bytes * BODY_COPIES + SLACK_BYTES
        self._idle_s, self._count = idle_s, count
        self._lock = threading.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, or None."""
        child = self._child
        return child.pid if child and child.is_alive else None

    def run(self, job: str, data: bytes, *, within_s: float = math.inf, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        """Run a job in the child.

        Args:
            job: A name in ``service.inference.decoding.PLAIN_JOBS``.
            data: The image file.
            within_s: Time until the caller gives up. A job that is cut by it is not counted against the image.
            arguments: JSON values for the job.

        Returns:
            The result's header and bytes.

        Raises:
            ImageError: Raised by the job; TooComplexError if the child died or was killed.
            DecoderBusyError: ``within_s`` passed.
        """
        deadline = time.monotonic() + within_s
        if not self._lock.acquire(timeout=-1 if math.isinf(within_s) else max(0.0, within_s)):
            raise DecoderBusyError
        try:
            header, payload = self._run({"job": job, **arguments}, data, deadline)
        finally:
            self._lock.release()
        error = header.get("error")
        self._count("rejected" if error else "ok")
        if error is None:
            return header, payload
        if error["type"] not in ERRORS:
            raise RuntimeError(f"The decoder process failed: {error['text']}")
        if error["type"] == "TooComplexError":
            raise TooComplexError(error["reason"], error["text"])
        failed: ImageError = getattr(errors, error["type"])(error["text"])
        raise failed

    def close(self) -> None:
        """End the child. A later job starts another one."""
        child, self._child = self._child, None
        if child:
            child.kill()

    def _run(self, header: dict[str, Any], data: bytes, deadline: float) -> tuple[dict[str, Any], bytes]:
        while True:
            child, left_s = self._ready_child(deadline), deadline - time.monotonic()
            if left_s <= 0:
                raise DecoderBusyError
            try:
                return child.run(header, data, min(left_s, self.timeout_s))
            except TimeoutError:
                child.kill()
                if left_s < self.timeout_s:
                    self._count("cut")
                    raise DecoderBusyError from None
                self._count("timeout")
                raise TooComplexError(
                    "timeout",
                    f"Decoding the image took longer than {self.timeout_s:g} s. Save it again as a normal JPEG or PNG.",
                ) from None
            except (OSError, EOFError, ValueError):
                if child.end() != 0:  # else it had just ended because it was idle
                    self._count("crash")
                    raise TooComplexError(
                        "crash", "The image cannot be decoded within the memory limit. Save it again as a normal JPEG or PNG."
                    ) from None

    def _ready_child(self, deadline: float) -> _Child:
        """Return a child that has started."""
        child = self._child
        if child is None or not child.is_alive:
            child = self._child = _Child(self._memory_bytes, self._idle_s)
        if not child.wait_until_ready(min(deadline - time.monotonic(), START_S)):
            if time.monotonic() >= deadline:  # the child keeps starting, for the next job
                raise DecoderBusyError
            child.kill()
            raise RuntimeError("The decoder process did not start.")
        return child


class _Child:
    """The process. It ends itself after ``idle_s`` without a job."""

    def __init__(self, memory_bytes: int, idle_s: float) -> None:
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(memory_bytes), str(idle_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdin
        assert self._process.stdout
        self.pid = self._process.pid
        self._jobs = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._results = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, within_s: float) -> bool:
        """Wait until the process has started, which does not count as decoding. Returns false if that takes longer."""
        if not self._is_ready:
            try:
                self._is_ready = self._results.poll(max(0.0, within_s)) and self._results.recv_bytes(100) == READY
            except (OSError, EOFError):
                raise RuntimeError("The decoder process ended during its start.") from None
        return self._is_ready

    def run(self, header: dict[str, Any], data: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """Send a job and receive its result.

        Raises:
            TimeoutError: The job takes longer.
            OSError: The process ended, as for EOFError.
        """
        self._jobs.send_bytes(json.dumps(header | {"timeout_s": timeout_s}).encode())
        self._jobs.send_bytes(data)
        if not self._results.poll(timeout_s):
            raise TimeoutError
        result: dict[str, Any] = json.loads(self._results.recv_bytes(MAX_RESULT_BYTES))
        return result, self._results.recv_bytes(MAX_RESULT_BYTES)

    def kill(self) -> None:
        """End the process at once. A thread in ``run`` gets an error."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Return the exit code of a process that closed its pipes. One that is still alive is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.kill()
        return self._process.returncode


# The child


def main() -> None:
    """Run jobs until standard input ends, or until none has arrived for the idle time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which ends this process
    results = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # output of libraries must not be mixed with the results
    jobs = Connection(os.dup(0), writable=False)
    with contextlib.suppress(OSError):  # the kernel should kill this process before its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    _limit_memory(int(sys.argv[1]))
    results.send_bytes(READY)
    for header, data in _receive(jobs, idle_s=float(sys.argv[2])):
        # The parent kills this process in time; the alarm does if the parent is gone.
        signal.alarm(math.ceil(header.pop("timeout_s")) + 1)
        result, payload = _run_job(header.pop("job"), data, header)
        signal.alarm(0)
        results.send_bytes(json.dumps(result).encode())
        results.send_bytes(payload)


def _receive(jobs: Connection, *, idle_s: float) -> Iterator[tuple[dict[str, Any], bytes]]:
    with contextlib.suppress(EOFError, OSError):
        while jobs.poll(idle_s):
            yield json.loads(jobs.recv_bytes()), jobs.recv_bytes()


def _run_job(job: str, data: bytes, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        return PLAIN_JOBS[job](data, **arguments)
    except MemoryError:
        error: BaseException = TooComplexError("memory", "Decoding the image needs too much memory. Save a smaller image.")
    except Exception as raised:
        error = raised
    kind = {"type": type(error).__name__, "text": str(error), "reason": getattr(error, "reason", "")}
    return {"error": kind}, b""


def _limit_memory(budget_bytes: int) -> None:
    """Limit the address space to ``budget_bytes`` more than the process has mapped."""
    with contextlib.suppress(OSError, ValueError):  # there is no /proc, or a stricter limit
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + budget_bytes, mapped + budget_bytes))


if __name__ == "__main__":
    main()
