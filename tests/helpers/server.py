"""Run the service as a process (``serve(bundle)`` starts ``python -m service``), send requests and read metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from service.settings import RENAMED, Settings

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {row.name.upper() for row in dataclasses.fields(Settings)} | {
    "GUNICORN_CMD_ARGS",
    "PROMETHEUS_MULTIPROC_DIR",
    *RENAMED,
}
PAUSABLE_DECODING = ROOT / "tests" / "helpers" / "pausable_decoding"  # its sitecustomize.py is imported by the service
# The machine may be busy.
LONG_TIMEOUTS = {
    "deadline_ms": 300_000,
    "body_timeout_s": 300,
    "shutdown_timeout_s": 300,
    "decode_timeout_s": 300,
    "database_timeout_s": 300,
}
START_TIMEOUT_S = 300.0  # a model is loaded with low priority
RESPONSE_TIMEOUT_S = 300.0
T = TypeVar("T")


@dataclass(frozen=True)
class Response:
    """An HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The code of the problem, or None for other responses."""
        return self.json()["code"] if self.headers["Content-Type"] == "application/problem+json" else None


@dataclass(frozen=True)
class Server:
    """A running service. ``process`` is the master, in its own process group."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        return children(self.pid)

    def log(self) -> list[dict[str, Any]]:
        """Return every log line so far. A line that is not JSON fails the test."""
        return [json.loads(line) for line in _whole_lines(self.log_file)]

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = RESPONSE_TIMEOUT_S,
    ) -> Response:
        """Send a request on a new connection. An iterable body is sent in chunks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Response:
        return self.request("GET", path, **options)

    def post(
        self,
        body: bytes | Iterable[bytes],
        content_type: str = "image/jpeg",
        *,
        path: str = "/predict",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = RESPONSE_TIMEOUT_S,
    ) -> Response:
        return self.request("POST", path, body, headers={"Content-Type": content_type, **(headers or {})}, timeout_s=timeout_s)

    def metrics(self) -> dict[str, float]:
        """Return the metrics: ``http_requests_total{method="POST",...}`` -> value, with labels sorted by name."""
        return parse_metrics(self.get("/metrics").body.decode())

    def stop(self, *, timeout_s: float = RESPONSE_TIMEOUT_S) -> int:
        """Send SIGTERM, as an orchestrator does. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def serve(
    bundle: Path,
    *,
    ready: bool = True,
    max_files: int | None = None,
    python: str | Path = sys.executable,
    cwd: Path = ROOT,
    **env: object,
) -> Iterator[Server]:
    """Run the real service on a free port until the block ends; with ``ready`` the model is loaded first.

    The temporary folder and every process of the group are removed at the end.

    Args:
        bundle: the bundle to serve.
        ready: wait until the service is ready.
        max_files: the limit of open files.
        python: the interpreter.
        cwd: the working directory. Outside the checkout, the service installed for ``python`` runs.
        env: settings and environment variables (``port=4`` or ``PORT="4"``), on top of LONG_TIMEOUTS.
    """
    with tempfile.TemporaryDirectory(prefix="serving-", ignore_cleanup_errors=True) as folder:  # killed processes may write
        log_file = Path(folder) / "stderr"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [python, "-m", "service"],
                cwd=cwd,
                env=environment(
                    {**LONG_TIMEOUTS, "bundle": bundle, "port": 0, "TMPDIR": folder, "PYTHONPATH": PAUSABLE_DECODING, **env}
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (max_files, max_files)) if max_files else None,
            )
        try:
            server = Server(process, _port(process, log_file), log_file)
            if ready:
                poll(lambda: _alive(process, log_file) and _is_ready(server), within_s=START_TIMEOUT_S)
            yield server
        finally:
            _end(process)


def run_service(**env: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -m service`` and wait for it to exit."""
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        return subprocess.run(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env=environment({"port": 0, "TMPDIR": folder, **env}),
            capture_output=True,
            text=True,
            timeout=RESPONSE_TIMEOUT_S,
        )


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return this process's environment with ``settings`` and no other settings of the service."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {name.upper(): str(value) for name, value in settings.items()}


def poll(condition: Callable[[], T], *, within_s: float = 120.0, every_s: float = 0.02) -> T:
    """Call ``condition`` until its value is true and return the value. Fails the test after ``within_s``."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"did not come true within {within_s:g} s")
        time.sleep(every_s)
    return value


def children(pid: int) -> list[int]:
    """Return the ids of the child processes."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def parse_metrics(text: str) -> dict[str, float]:
    """Parse the Prometheus text format into name and labels -> value."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def multipart(*parts: tuple[str, str | None, bytes] | tuple[str, str | None, bytes, str]) -> tuple[bytes, str]:
    """``(field, file name or None, bytes[, media type])`` each -> body and Content-Type."""
    boundary = uuid.uuid4().hex
    body = b""
    for field, name, data, *kind in parts:
        file = "" if name is None else f'; filename="{name}"'
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{file}\r\n'.encode()
        body += f"Content-Type: {kind[0]}\r\n".encode() if kind else b""
        body += b"\r\n" + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _port(process: subprocess.Popen[bytes], log_file: Path) -> int:
    """Read the port from the log."""

    def find() -> int | None:
        _alive(process, log_file)
        for line in _whole_lines(log_file):
            if "Listening at: http://" in line:
                return int(json.loads(line)["message"].rpartition(" (")[0].rpartition(":")[2])
        return None

    return poll(find, within_s=START_TIMEOUT_S) or 0


def _whole_lines(log_file: Path) -> list[str]:
    """Return the complete lines. The last one may still be being written."""
    return log_file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()


def _is_ready(server: Server) -> bool:
    try:
        return server.get("/health/ready").status == 200
    except (OSError, http.client.HTTPException):  # not listening yet, or exiting
        return False


def _alive(process: subprocess.Popen[bytes], log_file: Path) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"the service ended with {process.returncode}:\n{log_file.read_text(encoding='utf-8')}")
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def serve_gallery(bundle: SimpleNamespace, folder: Path) -> Iterator[Server]:
    """Serve a bundle and its photos with a new review database in ``folder``, once the gallery lists the photos."""
    with serve(bundle.path, data_dir=bundle.data, database_url=f"sqlite:///{folder / 'reviews.db'}") as server:
        poll(lambda: server.get("/gallery/photos.json").status == 200)
        yield server
