"""Run a PostgreSQL server with empty, migrated review databases."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from service.db.connection import Database
from tests.helpers.system_packages import skip_without

HOST = "127.0.0.1"
TEMPLATE = "migrated"
START_TIMEOUT_S = 300
FAST = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=300", "jit=off")
_numbers = itertools.count()


class Postgres:
    """A running PostgreSQL server. ``create()`` copies a template database."""

    def __init__(self, port: int) -> None:
        self.port = port

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


@contextlib.contextmanager
def run_postgres() -> Iterator[Postgres]:
    """Run Debian's PostgreSQL in a temporary folder, with an English collation, until the block ends.

    It does not sync to disk. Data survives a killed process, but not a crash of the machine.
    """
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = _user()
    if user:
        shutil.chown(folder, user)

    def run(program: str, *words: object) -> None:
        done = subprocess.run(
            [str(programs / program), *map(str, words)], user=user, cwd=folder, text=True, capture_output=True, check=False
        )
        if done.returncode:
            logs = "".join(file.read_text() for file in folder.glob("log"))
            raise AssertionError(f"{program} ended with {done.returncode}:\n{done.stdout}{done.stderr}{logs}")

    data = folder / "data"
    control = ("-D", data, "-w", "-t", START_TIMEOUT_S)

    def start() -> int:
        """Start the server and return its port. If another process takes the free port first, try the next one."""
        for is_last in (False, False, False, True):
            port = free_port()
            options = " ".join(f"-c {setting}" for setting in (*FAST, f"listen_addresses={HOST}", f"port={port}"))
            try:
                run("pg_ctl", *control, "-l", folder / "log", "-o", f"{options} -k {folder}", "start")
            except AssertionError as error:
                if is_last or "Address already in use" not in str(error):
                    raise
            else:
                break
        return port

    try:
        language = ("--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en")
        run("initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync", *language)
        port = start()
        try:
            server = Postgres(port)
            server.run(f"CREATE DATABASE {TEMPLATE}")
            Database(server.url(TEMPLATE)).close()
            yield server
        finally:
            run("pg_ctl", *control, "-m", "immediate", "stop")
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
