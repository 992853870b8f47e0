"""Decode in a child process that is limited in time and memory, and that can be killed.

``python -m service.inference.decoder_process`` is the child. It reads jobs from its standard input and writes results to
its standard output, as messages of ``multiprocessing.connection``: a JSON header and the bytes, both ways. Its standard
error is discarded, as libtiff writes there what it thinks of a file.
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
BYTES_PER_PIXEL = 20  # the most that Pillow takes for any format while it decodes and converts
BODY_COPIES = 4
SLACK_BYTES = 128 << 20
READY = b"ready"
MAX_RESULT_BYTES = 256 << 20
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")  # of the environment: no keys, no database's password
ROOT = Path(__file__).resolve().parents[2]
ERRORS = {"ImageError", "UnsupportedImageError", "ImageTooLargeError", "TooComplexError"}


class DecoderBusyError(Exception):
    """The time was over before the process was free for this job."""


class DecoderProcess:
    """One child process, started with the first job, that does one job after another; for any number of threads.

    Args:
        max_pixels: Largest image, in pixels; together with ``max_body_bytes`` it decides the child's memory limit.
        max_body_bytes: Largest file.
        timeout_s: The child is killed when a job takes longer.
        idle_s: The child is ended after this time without a job, so that its memory is given back.
        count: Called with how each job ended: "ok", "rejected", "timeout" or "crash".
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
        self._turn = threading.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        child = self._child
        return child.pid if child and child.is_alive else None

    def run(self, job: str, data: bytes, *, within_s: float = math.inf, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        """Do a job of ``service.inference.decoding.PLAIN_JOBS`` in the child.

        Args:
            job: The job's name.
            data: The image file.
            within_s: Time until the caller gives up; a job that is cut off by it, and not by ``timeout_s``, is not counted
                against the image.
            arguments: The job's own, as JSON takes them.

        Returns:
            The result's header and bytes.

        Raises:
            ImageError: What the job raised; TooComplexError where the child was killed or died.
            DecoderBusyError: ``within_s`` was over.
        """
        until = time.monotonic() + within_s
        if not self._turn.acquire(timeout=-1 if math.isinf(within_s) else max(0.0, within_s)):
            raise DecoderBusyError
        try:
            return self._run(job, data, arguments, until)
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the child. A later job starts another."""
        child, self._child = self._child, None
        if child:
            child.kill()

    def _run(self, job: str, data: bytes, arguments: dict[str, Any], until: float) -> tuple[dict[str, Any], bytes]:
        child, timeout_s, is_cut = self._begin(until)
        try:
            header, payload = child.ask({"job": job, "timeout_s": timeout_s, **arguments}, data)
        except (OSError, EOFError, ValueError):
            child.kill()
            if child.was_slow and is_cut:
                self._count("cut")
                raise DecoderBusyError from None
            self._count("timeout" if child.was_slow else "crash")
            raise self._failure(child) from None
        child.end(self._idle_s)
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

    def _begin(self, until: float) -> tuple[_Child, float, bool]:
        """A child that is ready, the time for the job in it, and whether that is less than the time-out."""
        while True:
            if self._child is None or not self._child.is_alive:
                self._child = _Child(self._memory_bytes)
            child = self._child
            if not child.wait_until_ready(min(until - time.monotonic(), START_S)):
                if time.monotonic() >= until:  # it goes on, for the next job
                    raise DecoderBusyError
                child.kill()
                raise RuntimeError("The decoder process did not start.")
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise DecoderBusyError
            timeout_s = min(left_s, self.timeout_s)
            if child.begin(timeout_s):  # else it was ended just now, as it was idle
                return child, timeout_s, left_s < self.timeout_s

    def _failure(self, child: _Child) -> TooComplexError:
        if child.was_slow:
            return TooComplexError(
                "timeout", f"Decoding the image took longer than {self.timeout_s:g} s. Save it again as a normal JPEG or PNG."
            )
        return TooComplexError(
            "crash", "The image cannot be decoded within the memory that is allowed. Save it again as a normal JPEG or PNG."
        )


class _Child:
    """The process, and a thread that kills it when its time is over: a job's, or that of being idle."""

    def __init__(self, memory_bytes: int) -> None:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdin
        assert self._process.stdout
        self.pid = self._process.pid
        self.was_slow = False
        self._jobs = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._results = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self._is_ready = self._is_working = False
        self._kill_at = time.monotonic() + START_S + IDLE_S  # where nobody comes, once it has started
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="decoder-watch", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, within_s: float) -> bool:
        """Wait until the process has started, which is not to count as decoding. False where it has not by then."""
        if not self._is_ready:
            try:
                self._is_ready = self._results.poll(max(0.0, within_s)) and self._results.recv_bytes(100) == READY
            except (OSError, EOFError):
                raise RuntimeError("The decoder process ended before it had started.") from None
        return self._is_ready

    def begin(self, timeout_s: float) -> bool:
        """Note that a job begins. False where the process has ended."""
        with self._changed:
            self._is_working, self._kill_at = True, time.monotonic() + timeout_s
            self._changed.notify()
            return self.is_alive

    def end(self, idle_s: float) -> None:
        """Note that a job has ended."""
        with self._changed:
            self._is_working, self._kill_at = False, time.monotonic() + idle_s
            self._changed.notify()

    def ask(self, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Send a job and receive its result. Raises OSError or EOFError where the process ends meanwhile."""
        self._jobs.send_bytes(json.dumps(header).encode())
        self._jobs.send_bytes(data)
        result: dict[str, Any] = json.loads(self._results.recv_bytes(MAX_RESULT_BYTES))
        return result, self._results.recv_bytes(MAX_RESULT_BYTES)

    def kill(self) -> None:
        """End the process at once, and collect it. A thread in ``ask`` gets an error."""
        with self._changed:
            self._process.kill()
            self._process.wait()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self.is_alive:
                left_s = self._kill_at - time.monotonic()
                if left_s <= 0:
                    self.was_slow = self._is_working
                    self._process.kill()
                    self._process.wait()
                else:
                    self._changed.wait(left_s)


# The child


def main() -> None:
    """Serve jobs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which ends this process
    results = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what a library prints must not end up among the results
    jobs = Connection(os.dup(0), writable=False)
    with contextlib.suppress(OSError):  # where memory runs out, the kernel should choose this process, not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    _limit_memory(int(sys.argv[1]))
    results.send_bytes(READY)
    for header, data in _receive(jobs):
        # The parent kills this process in time; should the parent be gone, the alarm does.
        signal.alarm(math.ceil(header.pop("timeout_s")) + 1)
        result, payload = _do(header.pop("job"), data, header)
        signal.alarm(0)
        results.send_bytes(json.dumps(result).encode())
        results.send_bytes(payload)


def _receive(jobs: Connection) -> Iterator[tuple[dict[str, Any], bytes]]:
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield json.loads(jobs.recv_bytes()), jobs.recv_bytes()


def _do(job: str, data: bytes, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        return PLAIN_JOBS[job](data, **arguments)
    except MemoryError:
        error: BaseException = TooComplexError("memory", "Decoding the image needs too much memory; save it again smaller.")
    except Exception as raised:
        error = raised
    kind = {"type": type(error).__name__, "text": str(error), "reason": getattr(error, "reason", "")}
    return {"error": kind}, b""


def _limit_memory(budget_bytes: int) -> None:
    """Allow ``budget_bytes`` beyond what the process has mapped by now."""
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a stricter limit already
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + budget_bytes, mapped + budget_bytes))


if __name__ == "__main__":
    main()
