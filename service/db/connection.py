"""The connection: SQLite beside the service, or PostgreSQL for several replicas, brought to the schema's present version."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from models.errors import ConfigError

SCHEMA_REVISION = "0002"  # the newest of service/migrations; a test holds it against them
MIGRATIONS = Path(__file__).parent / "migrations"
WRITE_LOCK_ID = 7_201_931  # the advisory lock that one writer at a time holds in PostgreSQL
BUSY_TIMEOUT_MS = 15_000
CONNECT_TIMEOUT_S = "10"


class Database:
    """Transactions to read in and to write in. Of writers there is one at a time, so that none sees another's half."""

    def __init__(self, url: str) -> None:
        """Open ``url``, sqlite:///FILE or postgresql://...; raises ConfigError where it cannot be used."""
        self.engine = _create(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        try:
            self._migrate()
        except (SQLAlchemyError, OSError) as error:
            self.engine.dispose()
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise ConfigError(
                f"DATABASE_URL {_shown(self.engine.url)} cannot be opened ({reason}); "
                "start the database, or give sqlite:///FILE in a folder that can be written."
            ) from None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database throughout, whatever others write meanwhile."""
        with self.engine.connect() as connection:
            if not self.is_sqlite:  # SQLite does so anyway
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is on disk when the block is left, or not at all where it is left by an exception."""
        with self.engine.connect().execution_options(writing=True) as connection, connection.begin():
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": WRITE_LOCK_ID})
            yield connection

    def refresh_statistics(self) -> None:
        """What the planner knows of the tables, after many rows came in."""
        if self.is_sqlite:
            with self.write() as connection:
                connection.execute(text("ANALYZE"))
            return
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE) predictions, buckets"))

    def close(self) -> None:
        self.engine.dispose()

    def _migrate(self) -> None:
        """Bring the schema up to date, if it is not; of several processes one does."""
        if self._revision() == SCHEMA_REVISION:
            return
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        try:
            with self._alone() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError:
            revision = self._revision()
            self.close()
            raise ConfigError(
                f"DATABASE_URL {_shown(self.engine.url)} is at the revision {revision}, and this version of the service knows "
                f"those up to {SCHEMA_REVISION}; start the newer version that made it, or give another database."
            ) from None

    def _revision(self) -> str | None:
        with self.engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Connection]:
        """A transaction that no other process migrates beside."""
        if not self.is_sqlite:
            with self.write() as connection:
                yield connection
            return
        with Path(f"{self.engine.url.database}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self.write() as connection:
                yield connection


def _create(url: str) -> Engine:
    """An engine for ``url``; raises ConfigError for what is no URL of a database that is known here."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # not shown, as there may be a password in it
        raise ConfigError("DATABASE_URL is no URL; it must be sqlite:///FILE or postgresql://USER@HOST/NAME.") from None
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return create_engine(
            parsed.set(drivername="postgresql+psycopg", query={"connect_timeout": CONNECT_TIMEOUT_S} | dict(parsed.query)),
            pool_pre_ping=True,
            pool_size=8,
            max_overflow=24,
        )
    if parsed.drivername != "sqlite":
        raise ConfigError(f"DATABASE_URL names {parsed.drivername}; sqlite:///FILE and postgresql://... are known here.")
    if not parsed.database or parsed.database.startswith((":", "file:")) or parsed.query:
        raise ConfigError(f"DATABASE_URL is {_shown(parsed)}, which names no file; write it as sqlite:///FILE.")
    try:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder of DATABASE_URL {_shown(parsed)} cannot be made ({error.strerror}); "
            "give a file in a folder that can be written."
        ) from None
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1e3}, pool_size=8, max_overflow=120)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _shown(url: URL) -> str:
    """What may stand in a message: no password, which can be among the options too."""
    return url.set(query={}).render_as_string()


def _prepare_sqlite(connection: Any, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver's own idea of transactions would leave selects outside of them
    for pragma in (
        "journal_mode=WAL",
        "foreign_keys=ON",
        "synchronous=FULL",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "cache_size=-16000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: one that read first could not be let through after another's write."""
    writing = connection.get_execution_options().get("writing")
    connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if writing else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
