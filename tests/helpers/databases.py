"""Review databases to test on, SQLite and PostgreSQL, each new, empty and at the newest revision."""

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
PATIENCE_S = 300
FAST = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=300", "jit=off")
_numbers = itertools.count()


class Postgres:
    """A PostgreSQL server that runs; ``create()`` gives a database of its own, as fast as files are copied."""

    def __init__(self, port: int) -> None:
        self.port = port

    def url(self, name: str) -> str:
        return f"postgresql://tester@{HOST}:{self.port}/{name}"

    def create(self, *, migrated: bool = True) -> str:
        """The URL of a new database, which has the tables already unless ``migrated`` is false."""
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
    """Start Debian's PostgreSQL in a temporary folder, with an English collation, until the block ends.

    It cares for nothing that would outlive the machine's crash: a killed process loses nothing all the same.
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
    control = ("-D", data, "-w", "-t", PATIENCE_S)

    def start() -> int:
        """Gives its port. A free one may be another's by the time that it is bound: then the next is tried."""
        for is_last in (False, False, False, True):
            port = _free_port()
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
    """Return the programs of the newest server that Debian has installed; skip the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        skip_without("postgresql")
    return found[-1].parent


def _user() -> str | None:
    """Whom the server runs as: it refuses root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])
