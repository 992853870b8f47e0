"""Run a PostgreSQL server with empty, migrated review databases."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from service.db.connection import Database
from tests.helpers.server import children, is_running, poll
from tests.helpers.system_packages import skip_without

HOST = "127.0.0.1"
TEMPLATE = "migrated"
START_TIMEOUT_S = 300
FAST = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=300", "jit=off")
_numbers = itertools.count()


class Postgres:
    """A PostgreSQL server in a folder. ``create()`` copies a template database."""

    def __init__(self, folder: Path) -> None:
        self.port = 0
        self._folder, self._data = folder, folder / "data"
        self._programs, self._user = _programs(), _user()
        if self._user:
            shutil.chown(folder, self._user)

    def initialize(self) -> None:
        """Create the files of the server, with an English collation."""
        language = ("--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en")
        self._run("initdb", "-D", self._data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync", *language)

    def start(self) -> None:
        """Start the server, on a free port the first time. If another process takes the port first, try the next one."""
        for is_last in (False, False, False, True):
            port = self.port or free_port()
            options = " ".join(f"-c {setting}" for setting in (*FAST, f"listen_addresses={HOST}", f"port={port}"))
            try:
                self._control("-l", self._folder / "log", "-o", f"{options} -k {self._folder}", "start")
            except AssertionError as error:
                if is_last or self.port or "Address already in use" not in str(error):
                    raise
            else:
                break
        self.port = port

    def stop(self) -> None:
        self._control("-m", "immediate", "stop")

    def kill(self) -> None:
        """Kill every process of the server with SIGKILL."""
        server = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(server, signal.SIGSTOP)  # it starts no more processes
        processes = [*children(server), server]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):  # it ended at this moment
                os.kill(pid, signal.SIGKILL)
        poll(lambda: not any(map(is_running, processes)))
        for lock in (self._data / "postmaster.pid", self._folder / f".s.PGSQL.{self.port}.lock"):
            lock.unlink()  # to the next server, a zombie looks like a running one

    def url(self, name: str) -> str:
        return f"postgresql://tester@{HOST}:{self.port}/{name}"

    def create(self, *, migrated: bool = True) -> str:
        """Create a database and return its URL. It has the tables unless ``migrated`` is false."""
        name = f"test_{next(_numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE if migrated else 'template0'}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.run(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _control(self, *words: object) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-t", START_TIMEOUT_S, *words)

    def _run(self, program: str, *words: object) -> None:
        command = [str(self._programs / program), *map(str, words)]
        done = subprocess.run(command, user=self._user, cwd=self._folder, text=True, capture_output=True, check=False)
        if done.returncode:
            logs = "".join(file.read_text() for file in self._folder.glob("log"))
            raise AssertionError(f"{program} ended with {done.returncode}:\n{done.stdout}{done.stderr}{logs}")


@contextlib.contextmanager
def run_postgres() -> Iterator[Postgres]:
    """Run Debian's PostgreSQL in a temporary folder until the block ends.

    It does not sync to disk. Data survives a killed process, but not a crash of the machine.
    """
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        server = Postgres(folder)
        server.initialize()
        server.start()
        try:
            server.run(f"CREATE DATABASE {TEMPLATE}")
            Database(server.url(TEMPLATE)).close()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _programs() -> Path:
    """Return the folder of the newest installed server, or skip the test."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        skip_without("postgresql")
    return found[-1].parent


def _user() -> str | None:
    """Return the user to run the server as, because it does not run as root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else pwd.getpwuid(65534).pw_name


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])
