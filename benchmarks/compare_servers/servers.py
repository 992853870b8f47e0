"""The servers of a comparison: how each is started and what requests it takes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serve_speed import encode_request, free_port, is_complete

ROOT = Path(__file__).resolve().parents[2]
APPS = "benchmarks.compare_servers.apps"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
CPUS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Server:
    """A server that can be started.

    Attributes:
        title: What it runs.
        command: The arguments of Python that start it on a port.
        packages: What has to be installed.
        threads: The threads that PyTorch uses for one operation, in each process.
        path: Where images are posted.
        takes_forms: Whether the image is in a multipart form. Otherwise it is the body.
    """

    title: str
    command: Callable[[int], Sequence[str]]
    packages: tuple[str, ...] = ()
    threads: int = CPUS
    path: str = "/predict"
    takes_forms: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def encode(self, photo: bytes) -> bytes:
        """Encode a request."""
        if self.takes_forms:
            return encode_request(photo, self.path)
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {len(photo)}\r\n\r\n"
        )
        return head.encode() + photo


def _litserve(workers: int) -> Callable[[int], list[str]]:
    return lambda port: ["-m", f"{APPS}.litserve_app", str(port), str(workers)]


def _mosec(port: int) -> list[str]:
    return ["-m", f"{APPS}.mosec_app", "--address", "127.0.0.1", "--port", str(port), "--timeout", "60000"]


def _flask(port: int) -> list[str]:
    options = ["--worker-class", "gthread", "--workers", "1", "--threads", "8", "--timeout", "0", "--bind", f"127.0.0.1:{port}"]
    return ["-m", "gunicorn", *options, f"{APPS}.flask_app:app"]


PEERS = {
    "litserve": Server("LitServe, 1 worker", _litserve(1), ("litserve", "python_multipart", "torch", "PIL")),
    "litserve-workers": Server(
        f"LitServe, {CPUS} workers", _litserve(CPUS), ("litserve", "python_multipart", "torch", "PIL"), threads=1
    ),
    "mosec": Server("mosec", _mosec, ("mosec", "torch", "PIL"), path="/inference", takes_forms=False),
    "flask": Server("Flask and gunicorn", _flask, ("flask", "gunicorn", "torch", "PIL")),
}


def service(bundle: Path) -> Server:
    """Return the service with its default settings. Photos that it would give no label get one, as from the others."""
    environment = {"BUNDLE": str(bundle), "HOST": "127.0.0.1"}
    return Server("this project", lambda port: ["-m", "service"], path="/predict?abstain=0", environment=environment)


def missing_packages(python: str, servers: Sequence[Server]) -> list[str]:
    """Return the packages that servers need and an environment does not have."""
    names = list(dict.fromkeys(package for server in servers for package in server.packages))
    code = "import sys; from importlib.util import find_spec; print(*[name for name in sys.argv[1:] if not find_spec(name)])"
    return subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout.split()


@dataclass(frozen=True)
class RunningServer:
    """A server that has sent its first prediction, ``start_s`` after it was started."""

    pid: int
    port: int
    start_s: float


@contextlib.contextmanager
def running(server: Server, python: str, *, network: Path, request: bytes) -> Iterator[RunningServer]:
    """Run a server until it has responded to ``request``, and end all of its processes afterwards.

    Args:
        server: The server.
        python: The Python that runs it.
        network: The folder of ``export_network``.
        request: An encoded request.

    Raises:
        RuntimeError: It did not respond in time, ended, or responded with an error.
    """
    port = free_port()
    threads = {"TORCH_THREADS": str(server.threads), "OMP_NUM_THREADS": str(server.threads)} if server.packages else {}
    paths = {"PYTHONPATH": str(ROOT), "NETWORK": str(network), "PORT": str(port)}
    environment = {**os.environ, **paths, **threads, **server.environment}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [python, *server.command(port)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not _has_responded(port, request):
                if process.poll() is not None or time.perf_counter() > started + START_TIMEOUT_S:
                    log.seek(0)
                    raise RuntimeError(f"{server.title} did not respond:\n{log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.02)
            yield RunningServer(process.pid, port, time.perf_counter() - started)
        finally:
            _end_session(process)


def _has_responded(port: int, request: bytes) -> bool:
    response = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT_S) as connection:
        connection.sendall(request)
        while not is_complete(response) and (received := connection.recv(1 << 16)):
            response += received
    if response and not response.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503")):
        raise RuntimeError(f"the server rejected a photo: {response.decode(errors='replace')}")
    return response.startswith(b"HTTP/1.1 200")


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, which are in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
