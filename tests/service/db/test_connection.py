"""service.db.connection: migrations, one sentence for each thing that can be wrong with DATABASE_URL, writers one by one."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, select, text

from models.errors import ConfigError
from service.db.connection import MIGRATIONS, SCHEMA_REVISION, Database
from service.db.ingest import get_or_create_model
from service.db.schema import buckets, metadata, models
from tests.helpers.databases import Postgres

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
    """What Alembic would have to change for the database to be what service.db.schema says."""
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))


def refused(url: str) -> str:
    """The one sentence that ``url`` is refused with."""
    with pytest.raises(ConfigError) as caught:
        Database(url)
    said = str(caught.value)
    assert "\n" not in said
    assert re.search(r"; [^.;]+\.$|; .+\.$", said), "it must say what to do"
    assert SECRET not in said
    return said


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'folder' / 'reviews.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(migrated=False)


def test_the_newest_revision_is_the_one_that_the_program_looks_for() -> None:
    assert ScriptDirectory.from_config(config()).get_current_head() == SCHEMA_REVISION


def test_migrations_make_the_tables_as_they_are_described(database: Database) -> None:
    assert tables_of(database) == set(metadata.tables) | {"alembic_version"}
    assert difference(database) == []


def test_down_to_nothing_and_up_again(empty_url: str) -> None:
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


def test_it_is_migrated_once_however_many_start_at_once(empty_url: str) -> None:
    program = "import sys; from service.db.connection import Database; sys.stdin.read(1); Database(sys.argv[1]).close()"
    started = [
        subprocess.Popen([sys.executable, "-c", program, empty_url], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    database = Database(empty_url)
    assert difference(database) == []
    database.close()


def test_a_database_of_a_newer_program_is_refused(database: Database, database_url: str) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    said = refused(database_url)
    assert "at the revision 9999" in said
    assert f"up to {SCHEMA_REVISION}" in said
    with database.read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "9999"


def test_a_database_of_an_older_program_that_says_nothing_is_brought_up(empty_url: str) -> None:
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
    ("url", "wanted"),
    [
        (f"mysql://me:{SECRET}@localhost/reviews", "DATABASE_URL names mysql"),
        (f"postgresql+asyncpg://me:{SECRET}@localhost/reviews", "DATABASE_URL names postgresql+asyncpg"),
        (f"reviews {SECRET}", "DATABASE_URL is no URL"),
        (f"postgresql//me:{SECRET}@localhost/reviews", "DATABASE_URL is no URL"),
        (f"postgresql://me:{SECRET}@localhost:port/reviews", "DATABASE_URL is no URL"),
        ("", "DATABASE_URL is no URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///file:reviews.db?uri=true", "names no file"),
        (f"postgresql://me:{SECRET}@127.0.0.1:1/reviews", "me:***@127.0.0.1:1/reviews cannot be opened"),
        (f"postgresql://me@127.0.0.1:1/reviews?password={SECRET}", "me@127.0.0.1:1/reviews cannot be opened"),
        (f"postgresql://me:{SECRET}@127.0.0.1:1/reviews?colour=blue", "cannot be opened"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(url: str, wanted: str) -> None:
    assert wanted in refused(url)


def test_files_that_cannot_be_used_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database, but some text of sufficient length to be a header of one" * 20)
    assert f"sqlite:///{tmp_path}/file cannot be opened (file is not a database)" in refused(f"sqlite:///{tmp_path}/file")
    assert "cannot be made (" in refused(f"sqlite:///{tmp_path}/file/reviews.db")
    assert "cannot be opened (unable to open database file)" in refused(f"sqlite:///{tmp_path}")


def test_what_postgresql_refuses_is_said_in_one_sentence(postgres: Postgres) -> None:
    assert 'database "nothing" does not exist' in refused(postgres.url("nothing").replace("tester", f"tester:{SECRET}"))
    assert 'role "nobody_knows" does not exist' in refused(postgres.url("postgres").replace("tester", "nobody_knows"))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql+psycopg"])
def test_postgresql_is_known_by_its_other_names(postgres: Postgres, scheme: str) -> None:
    url = postgres.create()
    database = Database(url.replace("postgresql", scheme))
    assert "predictions" in tables_of(database)
    database.close()
    postgres.drop(url)


def test_a_percent_sign_in_the_folder_is_no_trouble(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/100 % sure/ünï.db")
    assert "predictions" in tables_of(database)
    database.close()


def test_sqlite_is_as_safe_as_it_can_be(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/reviews.db")
    with database.read() as connection:
        said = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "foreign_keys", "synchronous")]
    assert said == ["wal", 1, 2]
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.write() as connection:
        connection.execute(insert(buckets).values(model_id=77, source="live", split="", label=0, predicted=0, percent=0,
                                                review="bad", duplicate=False, mislabelled=False, photos=0))  # fmt: skip
    database.close()


def test_what_the_planner_knows_stays_known(database: Database) -> None:
    with database.write() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
    database.refresh_statistics()
    query = (
        "SELECT count(*) FROM sqlite_stat1"
        if database.is_sqlite
        else "SELECT count(*) FROM pg_stat_user_tables WHERE relname IN ('predictions', 'cells') AND last_analyze IS NOT NULL"
    )
    with database.read() as connection:
        assert connection.execute(text(query)).scalar_one() > 0
    with database.write() as connection:  # the connection is as good as before
        get_or_create_model(connection, version="v2", name="b", classes=("x", "y"))
    with database.read() as connection:
        assert connection.execute(select(models.c.version).order_by(models.c.id)).scalars().all() == ["v1", "v2"]


def test_what_is_left_by_an_exception_is_not_written(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with database.read() as connection:
        assert connection.execute(select(models)).all() == []


def test_a_reader_sees_one_state_throughout(database: Database) -> None:
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
    with pytest.raises(sqlalchemy.exc.SQLAlchemyError), database.read() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))


def test_a_writer_waits_for_the_one_before_and_sees_all_that_it_wrote(database: Database) -> None:
    """Many threads that read, and write what follows from it: none is refused, and none overwrites another's."""
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


def test_128_threads_read_at_once(tmp_path: Path) -> None:
    """As many as the service may have; each waits for all others while it holds its connection."""
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


def test_the_file_is_one_that_others_can_read(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/reviews.db")
    with database.write() as connection:
        get_or_create_model(connection, version="v1", name="a", classes=("x", "y"))
    database.close()
    plain = sqlite3.connect(tmp_path / "reviews.db")
    assert plain.execute("SELECT version, classes FROM models").fetchall() == [("v1", '["x", "y"]')]
    plain.close()
