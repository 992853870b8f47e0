"""Database connections: migrations, error messages for DATABASE_URL, and one writer at a time."""

from __future__ import annotations

import fcntl
import re
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, insert, select, text

import service.db.connection
from models.errors import ConfigError
from service.db.connection import MIGRATIONS, SCHEMA_REVISION, Database
from service.db.errors import DatabaseUnavailableError
from service.db.filter import Filter
from service.db.ingest import get_or_create_model
from service.db.production import ServedPrediction, load_image, save_predictions
from service.db.query import PredictionQuery
from service.db.schema import buckets, imports, metadata, models
from service.reviews.decisions import list_reviews, load_history
from tests.helpers.databases import Postgres
from tests.helpers.gallery_rows import check_buckets, import_table, make_predictions
from tests.helpers.server import poll

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SECRET = "hunter2"


def config() -> Config:
    found = Config()
    found.set_main_option("script_location", str(MIGRATIONS))
    return found


def tables_of(database: Database) -> set[str]:
    with database.read() as connection:
        return set(sqlalchemy.inspect(connection).get_table_names())


def difference(database: Database) -> list[object]:
    """Return what Alembic would change to make the database match service.db.schema."""
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))


def rejected(url: str) -> str:
    """Return the message with which ``url`` is rejected."""
    with pytest.raises(ConfigError) as caught:
        Database(url)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"\. (Use|Start) .+\.$", message), "it must say what to do"
    assert SECRET not in message
    return message


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'folder' / 'reviews.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(migrated=False)


def test_the_newest_revision_is_the_expected_one() -> None:
    assert ScriptDirectory.from_config(config()).get_current_head() == SCHEMA_REVISION


def test_migrations_create_the_tables_of_the_schema(database: Database) -> None:
    assert tables_of(database) == set(metadata.tables) | {"alembic_version"}
    assert difference(database) == []


def test_migrations_can_be_reverted_and_applied_again(empty_url: str) -> None:
    database = Database(empty_url)
    down = config()
    with database.write() as connection:
        down.attributes["connection"] = connection
        command.downgrade(down, "base")
    assert tables_of(database) == {"alembic_version"}
    database.close()
    again = Database(empty_url)
    assert difference(again) == []
    again.close()


LIVE = "ab" * 32
DOG = "cd" * 32
ROWS_0001 = f"""
INSERT INTO models (version, name, classes, seen_at) VALUES ('v1', 'm', '["cats", "dogs"]', '2026-11-01 00:00:00+00:00');
INSERT INTO imports (model_id, digest, source, photos, imported_at)
  VALUES (1, 'd', 'evaluation', 1, '2026-11-01 00:00:00+00:00');
INSERT INTO cells (model_id, source, split, label, predicted, percent, review, duplicate, mislabelled, photos,
  loss_low, loss_high, confidence_low, confidence_high, margin_low, margin_high, photo_low, photo_high) VALUES
  (1, 'evaluation', 'valid', 1, 0, 75, 'relabelled', false, true, 1, 1.5, 1.5, 0.75, 0.75, 0.5, 0.5,
    'live/dog.jpg', 'live/dog.jpg'),
  (1, 'live', '', -1, 0, 75, 'neither', false, false, 1, -1, -1, 0.75, 0.75, 0.5, 0.5, 'live/{LIVE[:16]}', 'live/{LIVE[:16]}'),
  (1, 'live', '', -1, 1, 75, 'unreviewed', false, false, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO predictions (model_id, cell_id, photo, sha256, loss, confidence, margin, shuffle, probabilities) VALUES
  (1, 1, 'live/dog.jpg', '{DOG}', 1.5, 0.75, 0.5, 1, PROBABILITIES),
  (1, 2, 'live/{LIVE[:16]}', '{LIVE}', -1, 0.75, 0.5, 2, PROBABILITIES);
INSERT INTO decisions (sha256, photo, label, decision, new_label, note, reviewer, model_version, decided_at) VALUES
  ('{DOG}', 'live/dog.jpg', 'cats', 'label', 'dogs', '', 'Ann', 'v1', '2026-11-02 00:00:00+00:00'),
  ('{LIVE}', 'live/{LIVE[:16]}', NULL, 'neither', NULL, '', 'Ann', 'v1', '2026-11-02 00:00:00+00:00');
INSERT INTO current_reviews (sha256, photo, label, decision, new_label, note, reviewer, decided_at, decision_id)
  SELECT sha256, photo, label, decision, new_label, note, reviewer, decided_at, id FROM decisions;
INSERT INTO live_photos (sha256, data, received_at) VALUES ('{LIVE}', PROBABILITIES, '2026-11-01 00:00:00+00:00')
"""


def migrate(database: Database, revision: str) -> None:
    to = config()
    with database.write() as connection:
        to.attributes["connection"] = connection
        (command.downgrade if revision < SCHEMA_REVISION else command.upgrade)(to, revision)


def test_a_downgrade_merges_buckets_that_differ_in_the_ood_score_alone(database: Database, tmp_path: Path) -> None:
    message = make_predictions(1, 200, ("cats", "dogs"))
    columns = {"camera": tuple(("left", "right")[i % 2] for i in range(200))}
    rows = import_table(database, replace(message, facets=columns), tmp_path)
    assert {row.unlike for row in rows} == {True, False}

    def counts() -> tuple[int, int, int]:
        with database.read() as connection:
            sums = (
                "(SELECT sum(images) FROM buckets), (SELECT count(*) FROM photo_columns), (SELECT count(*) FROM photo_facets)"
            )
            return tuple(connection.execute(text(f"SELECT {sums}")).one())  # type: ignore[return-value]

    before = counts()
    assert before == (200, 200, 200)
    migrate(database, "0004")
    assert counts() == before
    migrate(database, SCHEMA_REVISION)
    assert counts() == before
    assert difference(database) == []
    check_buckets(database)


def test_the_rows_of_the_first_revision_are_kept(empty_url: str) -> None:
    """Also a photo of the data folder whose name looks like that of a saved one."""
    database = Database(empty_url)
    migrate(database, "0001")
    assert {"cells", "live_photos"} <= tables_of(database)
    probabilities = np.array([0.75, 0.25], "<f4").tobytes()
    literal = f"X'{probabilities.hex()}'" if database.is_sqlite else f"'\\x{probabilities.hex()}'"
    with database.write() as connection:
        for statement in ROWS_0001.replace("PROBABILITIES", literal).strip().split(";\n"):
            connection.exec_driver_sql(statement)
    database.close()

    database = Database(empty_url)
    assert difference(database) == []
    name = f"production/{LIVE[:16]}"
    with database.read() as connection:
        found = PredictionQuery(connection, Filter(model="v1"))
        dog, live = found.page(1)
        assert (dog.photo, dog.source, dog.review, dog.mislabeled) == ("live/dog.jpg", "evaluation", "relabeled", True)
        assert (live.photo, live.source, live.review, live.outcome) == (name, "production", "neither", "unlabeled")
        assert (live.sha256, live.decision and live.decision.id) == (LIVE, 2)
        assert (dog.received_at, live.received_at) == (None, datetime(2026, 11, 1, tzinfo=timezone.utc))
        assert found.counts.facets["source"] == {"evaluation": 1, "production": 1}
        assert load_image(connection, LIVE) == probabilities
        assert [row.photo for row in list_reviews(connection)] == ["live/dog.jpg", name]
        assert [row.photo for row in load_history(connection, LIVE)] == [name]
        assert connection.execute(select(imports.c.images)).scalars().all() == [1]
    check_buckets(database)

    with database.write() as connection:  # ids continue after the existing ones
        classes = ("cats", "dogs")
        model = get_or_create_model(connection, version="v1", name="m", classes=classes)
        served = ServedPrediction(b"image", "ef" * 32, np.array([0.25, 0.75], np.float32), datetime.now(timezone.utc))
        assert save_predictions(connection, model, classes, [served]) == 1
    check_buckets(database)
    migrate(database, "0001")
    with database.read() as connection:
        photos = connection.exec_driver_sql(
            "SELECT photo, source FROM predictions JOIN cells ON cells.id = cell_id ORDER BY photo"
        )
        assert photos.all() == [
            (f"live/{LIVE[:16]}", "live"), ("live/dog.jpg", "evaluation"), (f"live/{'ef' * 8}", "live")
        ]  # fmt: skip
    database.close()


def test_a_new_sqlite_file_is_opened_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite does not wait for another process that changes the journal mode."""
    opened: list[int] = []
    create_engine = service.db.connection._create_sqlite_engine

    def create(*arguments: Any) -> sqlalchemy.Engine:
        engine = create_engine(*arguments)
        event.listen(engine, "connect", lambda *_: opened.append(1))
        return engine

    monkeypatch.setattr(service.db.connection, "_create_sqlite_engine", create)
    url = f"sqlite:///{tmp_path / 'reviews.db'}"
    with (tmp_path / "reviews.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: Database(url).close())
        thread.start()
        poll(lambda: _is_waiting_for(tmp_path / "reviews.db.lock"))
        assert opened == []
    thread.join()
    assert opened


def _is_waiting_for(file: Path) -> bool:
    """Return whether a lock of the file is waited for, as Linux lists it."""
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(words[6].rpartition(":")[2] == str(file.stat().st_ino) for words in waiting)


def test_concurrent_starts_migrate_the_database_once(empty_url: str) -> None:
    program = "import sys; from service.db.connection import Database; sys.stdin.read(1); Database(sys.argv[1]).close()"
    started = [
        subprocess.Popen([sys.executable, "-c", program, empty_url], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    message = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], message
    database = Database(empty_url)
    assert difference(database) == []
    database.close()


def test_a_database_of_a_newer_version_is_rejected(database: Database, database_url: str) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    message = rejected(database_url)
    assert "has the revision 9999" in message
    assert f"up to {SCHEMA_REVISION}" in message
    with database.read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "9999"


def test_an_unversioned_database_of_an_older_version_is_migrated(empty_url: str) -> None:
    """A start that was killed between making Alembic's table and filling it leaves that table empty."""
    database = Database(empty_url)
    with database.write() as connection:
        metadata.drop_all(connection)
        connection.execute(text("DELETE FROM alembic_version"))
    database.close()
    again = Database(empty_url)
    assert difference(again) == []
    again.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"mysql://me:{SECRET}@localhost/reviews", "DATABASE_URL names mysql"),
        (f"postgresql+asyncpg://me:{SECRET}@localhost/reviews", "DATABASE_URL names postgresql+asyncpg"),
        (f"reviews {SECRET}", "DATABASE_URL is not a URL"),
        (f"postgresql//me:{SECRET}@localhost/reviews", "DATABASE_URL is not a URL"),
        (f"postgresql://me:{SECRET}@localhost:port/reviews", "DATABASE_URL is not a URL"),
        ("", "DATABASE_URL is not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///file:reviews.db?uri=true", "names no file"),
        (f"postgresql://me:{SECRET}@127.0.0.1:1/reviews", "me:***@127.0.0.1:1/reviews cannot be opened"),
        (f"postgresql://me@127.0.0.1:1/reviews?password={SECRET}", "me@127.0.0.1:1/reviews cannot be opened"),
        (f"postgresql://me:{SECRET}@127.0.0.1:1/reviews?colour=blue", "cannot be opened"),
    ],
)
def test_an_unusable_url_is_rejected_in_one_sentence(url: str, expected: str) -> None:
    assert expected in rejected(url)


def test_unusable_files_are_rejected_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database, but some text of sufficient length to be a header of one" * 20)
    assert f"sqlite:///{tmp_path}/file cannot be opened (file is not a database)" in rejected(f"sqlite:///{tmp_path}/file")
    assert "cannot be created (" in rejected(f"sqlite:///{tmp_path}/file/reviews.db")
    assert "cannot be opened (unable to open database file)" in rejected(f"sqlite:///{tmp_path}")


def test_errors_of_postgresql_are_explained_in_one_sentence(postgres: Postgres) -> None:
    assert 'database "nothing" does not exist' in rejected(postgres.url("nothing").replace("tester", f"tester:{SECRET}"))
    assert 'role "unknown_role" does not exist' in rejected(postgres.url("postgres").replace("tester", "unknown_role"))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql+psycopg"])
def test_aliases_of_postgresql_are_accepted(postgres: Postgres, scheme: str) -> None:
    url = postgres.create()
    database = Database(url.replace("postgresql", scheme))
    assert "predictions" in tables_of(database)
    database.close()
    postgres.drop(url)


def test_a_percent_sign_in_the_path_is_supported(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/100% sure/ünï.db")
    assert "predictions" in tables_of(database)
    database.close()


def test_sqlite_uses_its_safest_settings(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/reviews.db")
    with database.read() as connection:
        message = [
            connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "foreign_keys", "synchronous")
        ]
    assert message == ["wal", 1, 2]
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.write() as connection:
        connection.execute(insert(buckets).values(model_id=77, source="production", split="", label=0, predicted=0, percent=0,
                                                review="bad", duplicate=False, mislabeled=False, unlike=False,
                                                images=0))  # fmt: skip
    database.close()


def test_the_statistics_of_the_planner_are_kept(database: Database) -> None:
    with database.write() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
    database.refresh_statistics()
    query = (
        "SELECT count(*) FROM sqlite_stat1"
        if database.is_sqlite
        else "SELECT count(*) FROM pg_stat_user_tables WHERE relname IN ('predictions', 'buckets') AND last_analyze IS NOT NULL"
    )
    with database.read() as connection:
        assert connection.execute(text(query)).scalar_one() > 0
    with database.write() as connection:  # the connection is as good as before
        get_or_create_model(connection, version="v2", name="b", classes=("x", "y"))
    with database.read() as connection:
        assert connection.execute(select(models.c.version).order_by(models.c.id)).scalars().all() == ["v1", "v2"]


def test_an_exception_rolls_back_the_transaction(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with database.read() as connection:
        assert connection.execute(select(models)).all() == []


def test_a_reader_sees_one_snapshot(database: Database) -> None:
    def versions() -> list[str]:
        return list(connection.execute(select(models.c.version)).scalars())

    with database.read() as connection:
        assert versions() == []
        with database.write() as other:
            get_or_create_model(other, version="v1", name="a", classes=("x", "y"))
        assert versions() == []
    with database.read() as connection:
        assert versions() == ["v1"]


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseUnavailableError), database.read() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))


def test_a_writer_waits_for_the_previous_one_and_sees_its_changes(database: Database) -> None:
    """Many threads read a value and write the next one. No write fails or is lost."""
    threads, rounds = 16, 5

    def work(number: int) -> None:
        try:
            for _ in range(rounds):
                with database.write() as connection:
                    known = connection.execute(select(models.c.id)).all()
                    get_or_create_model(connection, version=f"v{len(known)}", name=str(number), classes=("x", "y"))
                with database.read() as connection:
                    connection.execute(select(models.c.name)).all()
        except Exception as error:  # it is the test's, not the thread's
            wrong.append(error)

    wrong: list[Exception] = []
    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []
    with database.read() as connection:
        found = connection.execute(select(models.c.version)).scalars().all()
    assert sorted(found) == sorted(f"v{number}" for number in range(threads * rounds))


def test_128_threads_read_concurrently(tmp_path: Path) -> None:
    """As many as the service allows. Each holds its connection until all others have one."""
    database = Database(f"sqlite:///{tmp_path}/reviews.db")
    together = threading.Barrier(128, timeout=300)
    found: list[int] = []

    def work() -> None:
        with database.read() as connection:
            count = connection.execute(text("SELECT count(*) FROM models")).scalar_one()
            together.wait()
            found.append(count)

    running = [threading.Thread(target=work) for _ in range(128)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    database.close()
    assert found == [0] * 128


def test_the_file_is_readable_by_other_users(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/reviews.db")
    with database.write() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
    database.close()
    plain = sqlite3.connect(tmp_path / "reviews.db")
    assert plain.execute("SELECT version, classes FROM models").fetchall() == [("v1", '["x", "y"]')]
    plain.close()


@pytest.mark.parametrize("replacement", [None, b"", b"garbage" * 1000, "a copy"])
def test_a_removed_or_replaced_file_fails_reads_and_writes(tmp_path: Path, replacement: bytes | str | None) -> None:
    file = tmp_path / "reviews.db"
    database = Database(f"sqlite:///{file}")
    if isinstance(replacement, str):
        replacement = file.read_bytes()
    for part in tmp_path.glob("reviews.db*"):
        part.unlink()
    if replacement is not None:
        file.write_bytes(replacement)
    with pytest.raises(DatabaseUnavailableError, match="was removed or replaced"), database.read():
        pass
    with pytest.raises(DatabaseUnavailableError, match="was removed or replaced"), database.write():
        pass
    database.close()


@pytest.mark.parametrize("name", ["reviews.db", "reviews.db-wal"])
def test_a_write_is_not_acknowledged_if_the_file_was_removed_during_it(tmp_path: Path, name: str) -> None:
    database = Database(f"sqlite:///{tmp_path}/reviews.db")

    def write() -> None:
        with database.write() as connection:
            get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
            (tmp_path / name).unlink()

    with pytest.raises(DatabaseUnavailableError, match="was removed or replaced"):
        write()
    database.close()


def test_a_damaged_file_is_reported_without_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "reviews.db"
    database = Database(f"sqlite:///{file}")
    database.close()
    with file.open("r+b") as stream:
        stream.write(b"garbage" * 1000)
    with pytest.raises(DatabaseUnavailableError) as caught, database.read() as connection:
        connection.execute(select(models))
    assert str(caught.value) == "The review database is not available, and nothing was saved. Try again in a few seconds."
    (record,) = (record for record in caplog.records if record.name == "service.db")
    assert record.reason == "file is not a database"  # type: ignore[attr-defined]
    assert record.exc_info is None
    database.close()


@pytest.fixture
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit how long a statement waits for a lock, but not how long it runs."""
    monkeypatch.setattr(service.db.connection, "STATEMENT_TIMEOUT_FACTOR", 5_000)


@pytest.mark.usefixtures("_slow_machine")
def test_a_request_waits_for_a_writer_for_a_limited_time_and_an_import_waits_longer(database_url: str) -> None:
    """Another process holds the lock of writers until the event; reads do not wait for it."""
    holder, waiting = Database(database_url), Database(database_url, timeout_s=0.1)
    with holder.write() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
        with waiting.read() as other:
            assert other.execute(select(models)).all() == []
        with pytest.raises(DatabaseUnavailableError), waiting.write():
            pass
        imported: list[int] = []

        def write_in_background() -> None:
            with waiting.write(background=True) as other:
                imported.append(get_or_create_model(other, version="v2", name="b", classes=("x", "y")))

        thread = threading.Thread(target=write_in_background)
        thread.start()
        with pytest.raises(DatabaseUnavailableError), waiting.write():
            pass
        assert imported == []
    thread.join()
    assert len(imported) == 1
    holder.close()
    waiting.close()


@pytest.mark.usefixtures("_slow_machine")
def test_a_locked_table_of_postgresql_fails_a_read_in_time(postgres: Postgres) -> None:
    url = postgres.create()
    holder, waiting = Database(url), Database(url, timeout_s=0.1)
    with holder.write() as connection:
        connection.execute(text("LOCK TABLE models IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(DatabaseUnavailableError), waiting.read() as other:
            other.execute(select(models))
    with waiting.read() as other:
        assert other.execute(select(models)).all() == []
    holder.close()
    waiting.close()
    postgres.drop(url)


def test_a_stopped_postgresql_is_unavailable_and_works_again(postgres: Postgres) -> None:
    """Terminating all sessions is what a restart does to them."""
    url = postgres.create()
    database = Database(url)
    name = url.rpartition("/")[2]

    def read() -> None:
        with database.read() as connection:
            postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            connection.execute(select(models))

    with pytest.raises(DatabaseUnavailableError):
        read()
    with database.write() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
    database.close()
    postgres.drop(url)
