"""Photos filtered and counted by the further columns of a table of labels, on SQLite and on PostgreSQL."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from models.artifacts.facets import OTHER
from models.artifacts.predictions import Predictions
from service.db import pagination
from service.db.connection import Database
from service.db.facets import list_columns, load_columns
from service.db.filter import Filter
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions
from service.db.query import PredictionQuery
from service.reviews.decisions import ReviewDecision, save_decision
from tests.helpers.gallery_rows import CLASSES, VERSION, make_predictions

PHOTOS = 300
COLUMNS = ("camera", "light: in/out", "site")


@dataclass(frozen=True)
class Photo:
    name: str
    columns: dict[str, str]
    label: str
    is_correct: bool


def enter(database: Database, table: Predictions, *, version: str = VERSION, digest: str = "d") -> list[Photo]:
    none = np.zeros(len(table.labels), dtype=np.bool_)
    with database.write() as connection:
        model = get_or_create_model(connection, version=version, name="m", classes=table.classes)
        import_predictions(connection, model, EvaluationTable("evaluation", digest, table, none, none, none))
    return [
        Photo(
            name.replace("\udcff", "\uf7ff"),
            {column: values[i] for column, values in table.facets.items()},
            table.classes[table.labels[i]],
            bool(table.correct[i]),
        )
        for i, name in enumerate(table.image_names)
    ]


def make_table(seed: int = 0) -> Predictions:
    rng = random.Random(seed)
    facets = {
        "camera": tuple(rng.choice(["left", "right", ""]) for _ in range(PHOTOS)),
        "light: in/out": tuple(rng.choice(["in", "out"]) for _ in range(PHOTOS)),
        "site": tuple(f"site {min(29, int(rng.expovariate(0.1)))}" for _ in range(PHOTOS)),
        "id": tuple(map(str, rng.sample([f"id {i}" for i in range(PHOTOS)], PHOTOS))),
    }
    groups = tuple(f"patient {i // 5}" for i in range(PHOTOS))
    return replace(make_predictions(seed, PHOTOS, CLASSES[2]), groups=groups, facets=facets)


def names(database: Database, filters: Filter) -> list[str]:
    with database.read() as connection:
        query = PredictionQuery(connection, filters)
        photos = [photo.photo for photo in query.fetch(query.ids())]
        assert len(photos) == query.counts.total
        return photos


def counts(database: Database, filters: Filter) -> dict[str, dict[str, int]]:
    with database.read() as connection:
        query = PredictionQuery(connection, filters)
        by_id = query.count_facet_values()
        found: dict[str, dict[str, int]] = {}
        for value in query.facet_values:
            found.setdefault(value.column, {})[value.value] = by_id.get(value.id, 0)
        return found


def test_filters_and_counts_are_those_of_the_table(database: Database) -> None:
    photos = enter(database, make_table())
    frequent = {site for site, _ in Counter(photo.columns["site"] for photo in photos).most_common(20)}

    def value_of(photo: Photo, column: str) -> str:
        value = photo.columns[column]
        return OTHER if column == "site" and value not in frequent else value or "(empty)"

    rng = random.Random(1)
    for _ in range(25):
        selected = {
            column: rng.sample(sorted({value_of(photo, column) for photo in photos}), rng.choice((0, 0, 1, 2)))
            for column in COLUMNS
        }
        outcomes = rng.choice([(), ("correct",), ("incorrect",)])
        facets = tuple(f"{column}:{value}" for column, values in selected.items() for value in values)
        filters = Filter(model=VERSION, outcomes=outcomes, facets=facets, sort="name", order="asc")

        def matches(photo: Photo, *, ignored: str = "", selected: dict[str, list[str]] = selected, outcomes=outcomes) -> bool:  # type: ignore[no-untyped-def]
            state = "correct" if photo.is_correct else "incorrect"
            in_columns = (
                value_of(photo, column) in values for column, values in selected.items() if values and column != ignored
            )
            return (not outcomes or state in outcomes) and all(in_columns)

        assert names(database, filters) == sorted(photo.name for photo in photos if matches(photo))
        found = counts(database, filters)
        assert set(found) == set(COLUMNS)
        for column, values in found.items():
            expected = Counter(value_of(photo, column) for photo in photos if matches(photo, ignored=column))
            assert values == {value: expected[value] for value in values}
            assert set(expected) <= set(values)


def test_an_unknown_value_matches_nothing(database: Database) -> None:
    enter(database, make_table())
    assert names(database, Filter(model=VERSION, facets=("camera:top",))) == []
    assert names(database, Filter(model=VERSION, facets=("weather:rain",))) == []


def test_all_columns_of_a_photo_are_stored_also_its_group_and_those_of_many_values(database: Database) -> None:
    table = make_table()
    enter(database, table)
    with database.read() as connection:
        query = PredictionQuery(connection, Filter(model=VERSION))
        record = query.find(table.image_names[7])
        assert list_columns(connection, query.model.id) == ["group", "camera", "light: in/out", "site", "id"]
        columns = load_columns(connection, [record.id])[record.id]
    expected = {"group": table.groups[7]} | {name: values[7] for name, values in table.facets.items() if values[7]}
    assert columns == expected


def test_values_that_no_database_stores_are_encoded(database: Database) -> None:
    table = replace(make_table(), facets={"note": ("a\udcffb", "nul\0") * (PHOTOS // 2)})
    enter(database, table)
    assert counts(database, Filter(model=VERSION))["note"] == {"a\uf7ffb": PHOTOS // 2, "nul\uf700": PHOTOS // 2}


def test_models_and_imports_do_not_mix(database: Database) -> None:
    first = make_table()
    enter(database, first)
    enter(database, make_table(1), version="v2")
    enter(database, first, digest="e")  # the same photos again, as after a cross-validation
    enter(database, replace(make_predictions(2, 50, CLASSES[2]), image_names=tuple(map(str, range(50)))), digest="f")
    found = counts(database, Filter(model=VERSION))
    assert sum(found["camera"].values()) == PHOTOS
    assert found["camera"] == Counter(value or "(empty)" for value in first.facets["camera"])


@pytest.mark.parametrize("few", [pagination.SMALL_RESULT, 0])
def test_a_page_of_a_facet_is_found_in_every_order(database: Database, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(pagination, "SMALL_RESULT", few)
    photos = enter(database, make_table())
    expected = sorted(photo.name for photo in photos if photo.columns["camera"] == "left")
    for sort in ("loss", "confidence", "margin", "newest", "name", "random"):
        filters = Filter(model=VERSION, facets=("camera:left",), per_page=24).replace(sort=sort)
        with database.read() as connection:
            query = PredictionQuery(connection, filters)
            pages = [photo for number in range(1, query.page_count + 1) for photo in query.page(number)]
            assert sorted(photo.photo for photo in pages) == expected
            before, previous, following = query.neighbors(pages[3])
            assert before == 3
            assert previous
            assert following
            assert (previous.photo, following.photo) == (pages[2].photo, pages[4].photo)


@pytest.mark.parametrize("has_statistics", [False, True])
@pytest.mark.parametrize("few", [pagination.SMALL_RESULT, 0])
def test_a_page_of_a_column_reads_indexes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int, has_statistics: bool
) -> None:
    """Few photos are selected by their ids, and many in the order of the page. A lower limit is like a million photos."""
    monkeypatch.setattr(pagination, "SMALL_RESULT", few)
    monkeypatch.setattr(pagination, "MIN_IMAGES_PER_BUCKET", 0)
    database = Database(f"sqlite:///{tmp_path / 'reviews.db'}")
    enter(database, make_table())
    if has_statistics:
        database.refresh_statistics()
    for sort, index in (("loss", "loss"), ("confidence", "confidence"), ("margin", "margin"), ("name", "photo")):
        filters = Filter(model=VERSION, facets=("camera:left",), outcomes=("correct",), sort=sort, per_page=24)
        counted, page = query_plans(database, filters)
        assert counted == ["SEARCH photo_facets USING COVERING INDEX ix_photo_facets_bucket (facet_value_id=?)"]
        if few:
            assert "SEARCH predictions USING INTEGER PRIMARY KEY (rowid=?)" in page
        else:
            assert page[0].startswith(f"SEARCH predictions USING COVERING INDEX ix_predictions_{index} (model_id=?")
            assert not any("TEMP B-TREE" in step for step in page)
            (lookup,) = (step for step in page if "photo_facets" in step)
            assert "(facet_value_id=? AND prediction_id=?)" in lookup
    database.close()


def query_plans(database: Database, filters: Filter) -> tuple[list[str], list[str]]:
    """Return the steps of SQLite's plans for counting a column's photos by bucket and for the ids of the second page."""
    statements: list[tuple[str, Any]] = []

    def remember(*arguments: Any) -> None:
        statements.append((arguments[2], arguments[3]))

    with database.read() as connection:
        event.listen(connection, "before_cursor_execute", remember)
        assert PredictionQuery(connection, filters).page(2)
        event.remove(connection, "before_cursor_execute", remember)
        count, page = (
            next((sql, values) for sql, values in statements if sql.startswith(f"SELECT {start}") and "photo_facets" in sql)
            for start in ("photo_facets.bucket_id", "predictions.id \n")
        )
        plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values).all() for sql, values in (count, page)]
    counted, selected = ([str(row[3]) for row in plan] for plan in plans)
    return counted, selected


def test_a_review_moves_the_photo_in_the_counts_of_its_columns(database: Database) -> None:
    photos = enter(database, make_table())
    left = [photo for photo in photos if photo.columns["camera"] == "left"]
    reviewed = Filter(model=VERSION, facets=("camera:left",), reviews=("bad",))
    assert names(database, reviewed) == []
    with database.write() as connection:
        record = PredictionQuery(connection, Filter(model=VERSION)).find(left[0].name)
        decision = ReviewDecision(
            model_version=VERSION, photo=record.photo, sha256=record.sha256, decision="bad", new_label=None
        )
        save_decision(connection, decision)
    assert names(database, reviewed) == [left[0].name]
    assert counts(database, reviewed)["camera"]["left"] == 1
    assert len(names(database, Filter(model=VERSION, facets=("camera:left",), reviews=("unreviewed",)))) == len(left) - 1


def test_the_query_string_of_a_facet_round_trips(tmp_path: Path) -> None:
    from werkzeug.datastructures import MultiDict

    from service.db.filter import describe_filter, parse_filter

    filters = Filter(model="v", facets=("camera:left, upper", "light: in/out:in"))
    assert filters.query() == "model=v&facet=camera%3Aleft%2C+upper&facet=light%3A+in%2Fout%3Ain"
    params = MultiDict([("model", "v"), ("facet", "camera:left, upper"), ("facet", "light: in/out:in")])
    assert parse_filter(params, model="") == filters
    assert filters.toggle("facet", "camera:left, upper").facets == ("light: in/out:in",)
    assert describe_filter(Filter(model="v", facets=("camera:left",)), 3, name="pets") == (
        "pets: 3 photos, camera = left, highest loss first"
    )
    assert filters.is_filtered
    assert not filters.cleared_filters().is_filtered
