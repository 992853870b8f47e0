"""Connect to the review database: SQLite, or PostgreSQL for several replicas. Apply pending migrations."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from models.errors import ConfigError
from service.db.errors import DatabaseUnavailableError
from service.db.schema import metadata

log = logging.getLogger("service.db")
SCHEMA_REVISION = "0008"  # newest migration; a test compares the two
MIGRATIONS = Path(__file__).parent / "migrations"
WRITE_LOCK_ID = 7_201_931  # the advisory lock of PostgreSQL that serializes writers
DEFAULT_TIMEOUT_S = 5.0
BACKGROUND_TIMEOUT_S = 600.0  # imports and migrations wait for those of other processes
STATEMENT_TIMEOUT_FACTOR = 6  # a statement may run for longer than it may wait for a lock
UNAVAILABLE = "The review database is not available, and nothing was saved. Try again in a few seconds."
REPLACED = "The file of the review database was removed or replaced while the server was running. Restart the server."


class Database:
    """Read and write transactions. Writers run one after the other, so that each sees all that earlier ones wrote."""

    def __init__(self, url: str, *, timeout_s: float | None = None) -> None:
        """Open a database and apply pending migrations.

        Args:
            url: sqlite:///FILE or postgresql://USER@HOST/NAME.
            timeout_s: How long a transaction waits for a connection or a lock.

        Raises:
            ConfigError: The database cannot be opened.
        """
        self.engine = _create_engine(url, DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._file = Path(self.engine.url.database or "") if self.is_sqlite else None
        self._file_id: tuple[int, int] | None = None
        self._wal: Path | None = None
        try:
            self._migrate()
            if self._file:
                self._file_id = _file_id(self._file)
                with self.engine.connect() as connection:
                    if connection.execute(text("PRAGMA journal_mode")).scalar() == "wal":
                        self._wal = Path(f"{self._file}-wal")
        except (SQLAlchemyError, OSError) as error:
            self.engine.dispose()
            raise ConfigError(
                f"DATABASE_URL {_without_secrets(self.engine.url)} cannot be opened ({_reason(error)}). "
                "Start the database, or use sqlite:///FILE in a writable folder."
            ) from None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the database, whatever others write in the meantime.

        Raises:
            DatabaseUnavailableError: The database failed.
        """
        with self._translate_errors(), self.engine.connect() as connection:
            if not self.is_sqlite:  # SQLite always does so
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self, *, background: bool = False) -> Iterator[Connection]:
        """Open a transaction that is on disk when the block ends, or rolled back if the block raises.

        Args:
            background: Wait for other writers for longer than a request may.

        Raises:
            DatabaseUnavailableError: The database failed. Nothing was saved.
        """
        with self._translate_errors():
            with self._begin_write(background=background) as connection:
                yield connection
            self._check_file()
            if self._wal and not self._wal.exists():  # removed: what was committed is in no file that a restart would read
                raise self._replaced(self._wal)

    def refresh_statistics(self) -> None:
        """Update the query planner's statistics after an import."""
        if self.is_sqlite:
            with self.write(background=True) as connection:
                connection.execute(text("ANALYZE"))
            return
        with self._translate_errors(), self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("VACUUM (ANALYZE) predictions, buckets"))
            connection.invalidate()  # the pool's connections have a timeout

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _begin_write(self, *, background: bool) -> Iterator[Connection]:
        options = {"writing": True, "background": background}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            if not self.is_sqlite:
                if background:
                    connection.execute(text("SET LOCAL lock_timeout = 0"))
                    connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": WRITE_LOCK_ID})
            yield connection

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        self._check_file()
        try:
            yield
        except (IntegrityError, DataError):  # errors of the caller, not of the database
            raise
        except (DBAPIError, sqlalchemy.exc.TimeoutError) as error:
            log.error("the review database failed", extra={"reason": _reason(error)})
            raise DatabaseUnavailableError(UNAVAILABLE) from None

    def _check_file(self) -> None:
        """Raise DatabaseUnavailableError if SQLite's open file is no longer the one that a restart would open."""
        if self._file is None:
            return
        try:
            if _file_id(self._file) == self._file_id:
                return
        except OSError:
            pass
        raise self._replaced(self._file)

    def _replaced(self, file: Path) -> DatabaseUnavailableError:
        log.error("a file of the review database was removed or replaced", extra={"file": str(file)})
        return DatabaseUnavailableError(REPLACED)

    def _migrate(self) -> None:
        """Create the tables of a new database, or apply pending migrations to an old one, in one process at a time."""
        with self._lock_file():
            with self.engine.connect() as connection:
                revision = _revision(connection)
            if revision == SCHEMA_REVISION:
                return
            from alembic import command
            from alembic.config import Config
            from alembic.util import CommandError

            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            try:
                with self._begin_write(background=True) as connection:
                    config.attributes["connection"] = connection
                    if _revision(connection) is None:
                        metadata.create_all(connection)
                        command.stamp(config, "head")
                    else:
                        command.upgrade(config, "head")
            except CommandError:
                self.close()
                raise ConfigError(
                    f"DATABASE_URL {_without_secrets(self.engine.url)} has the revision {revision}, and this version of the "
                    f"service supports revisions up to {SCHEMA_REVISION}. Start the version that created it, or use another "
                    "one."
                ) from None

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[None]:
        """Let one process at a time open and migrate a SQLite file.

        Two processes that change the journal mode of a new file at once would fail, as SQLite does not wait for that lock.
        """
        if self._file is None:
            yield
            return
        with Path(f"{self._file}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _create_engine(url: str, timeout_s: float) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the URL is not shown, as it may contain a password
        raise ConfigError("DATABASE_URL is not a URL. Use sqlite:///FILE or postgresql://USER@HOST/NAME.") from None
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _create_postgresql_engine(parsed, timeout_s)
    if parsed.drivername != "sqlite":
        raise ConfigError(f"DATABASE_URL names {parsed.drivername}. Use sqlite:///FILE or postgresql://USER@HOST/NAME.")
    if not parsed.database or parsed.database.startswith((":", "file:")) or parsed.query:
        raise ConfigError(f"DATABASE_URL {_without_secrets(parsed)} names no file. Use sqlite:///FILE.")
    try:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder of DATABASE_URL {_without_secrets(parsed)} cannot be created ({error.strerror}). "
            "Use a file in a writable folder."
        ) from None
    return _create_sqlite_engine(parsed, timeout_s)


def _create_postgresql_engine(url: URL, timeout_s: float) -> Engine:
    def set_timeouts(connection: Any, record: ConnectionPoolEntry) -> None:
        timeout_ms = round(timeout_s * 1e3)
        connection.execute(f"SET lock_timeout = {timeout_ms}")
        connection.execute(f"SET statement_timeout = {timeout_ms * STATEMENT_TIMEOUT_FACTOR}")
        connection.commit()

    connect_args = {"connect_timeout": str(max(2, round(timeout_s)))}  # libpq's minimum is 2
    engine = create_engine(
        url.set(drivername="postgresql+psycopg", query=connect_args | dict(url.query)),
        pool_pre_ping=True,
        pool_size=8,
        max_overflow=24,
        pool_timeout=timeout_s,
    )
    event.listen(engine, "connect", set_timeouts)
    return engine


def _create_sqlite_engine(url: URL, timeout_s: float) -> Engine:
    def prepare(connection: Any, record: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver would begin transactions late, after the first SELECT
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "cache_size=-16000"):
            connection.execute(f"PRAGMA {pragma}")

    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        is_writing = options.get("writing", False)
        busy_timeout_s = BACKGROUND_TIMEOUT_S if options.get("background") else timeout_s
        connection.exec_driver_sql(f"PRAGMA busy_timeout={round(busy_timeout_s * 1e3)}")
        connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if is_writing else 'ON'}")
        # A writer takes the lock at once: SQLite rejects a write after a read if another process wrote in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    connect_args = {"timeout": BACKGROUND_TIMEOUT_S}  # until the first transaction
    engine = create_engine(url, connect_args=connect_args, pool_size=8, max_overflow=120, pool_timeout=timeout_s)
    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def _revision(connection: Connection) -> str | None:
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _file_id(file: Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _reason(error: Exception) -> str:
    """Return the first line of a driver's message."""
    return (str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__])[0]


def _without_secrets(url: URL) -> str:
    """Return a URL without passwords, which the options may also contain."""
    return url.set(query={}).render_as_string()
