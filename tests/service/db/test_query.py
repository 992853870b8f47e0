"""Queries: every count and every page, compared with plain Python on predictions.csv."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from sqlalchemy import func, select

from service.db import pagination
from service.db.aggregates import HISTOGRAM_BINS
from service.db.connection import Database
from service.db.errors import InvalidFilterError, RecordNotFoundError
from service.db.filter import FACETS, SORT_ORDERS, Filter
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions
from service.db.query import PredictionQuery, get_model, list_models
from service.db.schema import imports, predictions
from service.db.text import encode_file_name
from service.reviews.decisions import ReviewDecision, load_history, save_decision
from tests.conftest import NewDatabase
from tests.helpers.gallery_rows import (
    CHECKS,
    CLASSES,
    VERSION,
    ExpectedRow,
    any_filter,
    check_buckets,
    import_table,
    make_predictions,
    matches,
    with_reviews,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = 120
EVERYTHING = Filter(model=VERSION)
Form = Literal["NFC", "NFD"]


@pytest.fixture(scope="module", params=[("sqlite", 2), ("sqlite", 5), ("postgresql", 2), ("postgresql", 5)], ids=str)
def gallery(
    request: pytest.FixtureRequest, new_database: NewDatabase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A model with two sources and decisions on a tenth of the photos. ``rows`` are the expected ones. Tests only read."""
    kind, count = request.param
    with new_database(kind) as url:
        database = Database(url)
        yield fill(database, CLASSES[count], tmp_path_factory.mktemp("gallery"))
        database.close()


def fill(database: Database, classes: tuple[str, ...], tmp_path: Path) -> SimpleNamespace:
    rows = import_table(database, make_predictions(1, PHOTOS, classes), tmp_path)
    other = make_predictions(2, PHOTOS // 2, classes)
    moved = tuple(photo.replace("/", "/fold/") for photo in other.image_names)
    other = type(other)(classes, moved, other.labels, other.probabilities, other.splits, tuple(s[::-1] for s in other.sha256s))
    rows += import_table(database, other, tmp_path, source="out-of-fold", seed=2)
    rng = random.Random(3)
    decided: dict[str, tuple[str, str | None]] = {}
    with database.write() as connection:
        for row in rng.sample(rows, PHOTOS // 10):
            decision = rng.choice(("label", "label", "neither", "bad"))
            new_label = rng.choice(classes) if decision == "label" else None
            words = {"photo": row.photo, "sha256": row.sha256, "model_version": VERSION}
            save_decision(connection, ReviewDecision(**words, decision=decision, new_label=new_label))  # type: ignore[arg-type]
            decided[row.sha256] = (decision, new_label)
    return SimpleNamespace(database=database, classes=classes, rows=with_reviews(rows, decided))


def test_every_count_matches_the_table(gallery: SimpleNamespace) -> None:
    rng = random.Random(4)
    filters = [EVERYTHING, *(any_filter(rng, gallery.rows, gallery.classes) for _ in range(25))]
    found_some = 0
    with gallery.database.read() as connection:
        for requested in filters:
            counts = PredictionQuery(connection, requested).counts
            rows = [row for row in gallery.rows if matches(row, requested)]
            found_some += bool(rows)
            assert counts.total == len(rows)
            assert counts.confusion == Counter((row.label, row.predicted) for row in rows)
            steps = [sum(i / HISTOGRAM_BINS <= row.confidence for row in rows) for i in range(HISTOGRAM_BINS)]
            assert counts.histogram == [more - fewer for more, fewer in zip(steps, [*steps[1:], 0], strict=True)]
            for parameter in FACETS:
                assert counts.facets[parameter] == facet(gallery.rows, requested, parameter), (parameter, requested)
    assert found_some > 10
    check_buckets(gallery.database)


def facet(rows: Sequence[ExpectedRow], requested: Filter, parameter: str) -> Counter[str]:
    """Return the count of each value of a facet, with the rest of the filter unchanged."""
    others = [row for row in rows if matches(row, requested, ignoring=parameter)]
    values = values_of(rows)[parameter]
    only = {value: EVERYTHING.toggle(parameter, value) for value in values}
    return Counter({value: n for value in values if (n := sum(CHECKS[parameter](row, only[value]) for row in others))})


def values_of(rows: Sequence[ExpectedRow]) -> dict[str, set[str]]:
    return {
        "outcome": {"correct", "incorrect"},
        "class": {row.label for row in rows},
        "predicted": {row.predicted for row in rows},
        "source": {row.source for row in rows},
        "split": {row.split for row in rows},
        "review": {row.review for row in rows},
        "flag": {"duplicate", "mislabeled", "unlike"},
    }


KEYS = {
    "loss": lambda row: row.loss,
    "confidence": lambda row: row.confidence,
    "margin": lambda row: row.margin,
    "name": lambda row: row.photo,
    "random": lambda row: 0,
    "outlier": lambda row: 0,  # none of these photos has an OOD score
}


@pytest.mark.parametrize(("few", "sparse"), [(pagination.SMALL_RESULT, pagination.MIN_IMAGES_PER_BUCKET), (10, 0)])
@pytest.mark.parametrize("sort", SORT_ORDERS)
def test_pages_contain_every_photo_once_and_in_order(
    gallery: SimpleNamespace, sort: str, few: int, sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both algorithms: lower limits make that for a million photos run on these."""
    monkeypatch.setattr(pagination, "SMALL_RESULT", few)
    monkeypatch.setattr(pagination, "MIN_IMAGES_PER_BUCKET", sparse)
    rng = random.Random(f"{sort} {few}")
    filters = [EVERYTHING, *(any_filter(rng, gallery.rows, gallery.classes) for _ in range(2))]
    for number, requested in enumerate(filters):
        there, back = (requested.replace(sort=sort, order=way, seed=number, per_page=24) for way in ("asc", "desc"))
        shown = {}
        with gallery.database.read() as connection:
            for requests in (there, back):
                listing = PredictionQuery(connection, requests)
                page_count = [listing.page(page) for page in range(1, listing.page_count + 1)]
                assert all(len(page) == 24 for page in page_count[:-1])
                assert listing.page(listing.page_count + 1) == []
                shown[requests.order] = [photo for page in page_count for photo in page]
                assert listing.ids() == [p.id for p in shown[requests.order]]
                assert [p.id for p in listing.first(5)] == [p.id for p in shown[requests.order][:5]]
        rows = [row for row in gallery.rows if matches(row, requested)]
        by_sha = {row.sha256: row for row in rows}
        assert sorted(p.sha256 for p in shown["asc"]) == sorted(by_sha)
        keys = [
            gallery.rows.index(row) if sort == "newest" else KEYS[sort](row) for row in (by_sha[p.sha256] for p in shown["asc"])
        ]
        assert keys == (
            sorted(keys) if sort in ("name", "newest", "outlier", "random") else pytest.approx(sorted(keys), rel=1e-6, abs=1e-9)
        )
        assert [p.id for p in shown["desc"]] == [p.id for p in reversed(shown["asc"])]


def test_a_random_order_depends_on_the_seed(gallery: SimpleNamespace) -> None:
    def names(seed: int) -> list[str]:
        with gallery.database.read() as connection:
            return [photo.photo for photo in PredictionQuery(connection, EVERYTHING.replace(sort="random", seed=seed)).page(1)]

    assert names(1) == names(1)
    assert len({tuple(names(seed)) for seed in range(6)}) == 6
    assert names(1) != sorted(names(1))


@pytest.mark.parametrize(("sort", "way"), [("loss", "desc"), ("confidence", "asc"), ("random", "asc"), ("random", "desc")])
@pytest.mark.parametrize("sparse", [pagination.MIN_IMAGES_PER_BUCKET, 0])
def test_a_photo_has_its_neighbors(
    gallery: SimpleNamespace, sort: str, way: str, sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagination, "MIN_IMAGES_PER_BUCKET", sparse)
    requested = EVERYTHING.replace(predicted=gallery.classes[:1], splits=("train",), sort=sort, order=way, seed=5)
    with gallery.database.read() as connection:
        listing = PredictionQuery(connection, requested)
        shown = listing.fetch(listing.ids())
        assert len(shown) > 5
        ids = [None, *(photo.id for photo in shown), None]
        for place, photo in enumerate(shown):
            before, previous, following = listing.neighbors(photo)
            found = (before, previous and previous.id, following and following.id)
            assert listing.matches(photo)
            assert found == (place, ids[place], ids[place + 2])


@pytest.mark.parametrize("sort", ["name", "loss"])
@pytest.mark.parametrize("sparse", [pagination.MIN_IMAGES_PER_BUCKET, 0])
def test_a_photo_outside_the_filter_has_a_position_too(
    gallery: SimpleNamespace, sort: str, sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a decision the photo may no longer match the filter. "Next" continues from its position."""
    monkeypatch.setattr(pagination, "MIN_IMAGES_PER_BUCKET", sparse)
    monkeypatch.setattr(pagination, "SMALL_RESULT", 10)
    model_total = EVERYTHING.replace(sort=sort)
    requested = model_total.replace(outcomes=("incorrect",))
    with gallery.database.read() as connection:
        whole = PredictionQuery(connection, model_total)
        shown = whole.fetch(whole.ids())
        narrow = PredictionQuery(connection, requested)
        for photo in shown[::37]:
            if photo.outcome == "correct":
                assert not narrow.matches(photo)
                before, previous, following = narrow.neighbors(photo)
                place = shown.index(next(p for p in shown if p.id == photo.id))
                wrong = [p.id if p.outcome == "incorrect" else None for p in shown]
                earlier, later = ([id_ for id_ in part if id_] for part in (wrong[:place], wrong[place:]))
                assert before == len(earlier)
                assert (previous and previous.id) == (earlier[-1] if earlier else None)
                assert (following and following.id) == (later[0] if later else None)


def test_a_photo_has_all_values_of_the_table(gallery: SimpleNamespace) -> None:
    by_name = {(row.photo, row.sha256): row for row in gallery.rows}
    assert any("\uf7ff" in row.photo for row in gallery.rows), "no name that is not UTF-8"
    with gallery.database.read() as connection:
        listing = PredictionQuery(connection, EVERYTHING.replace(labels=gallery.classes[:1]))
        for (name, sha256), row in list(by_name.items())[::7]:
            photo = listing.find(name, sha256)
            message = (photo.label, photo.predicted, photo.split, photo.source, photo.review, photo.duplicate, photo.mislabeled)
            assert message == (row.label, row.predicted, row.split, row.source, row.review, row.duplicate, row.mislabeled)
            assert photo.outcome == row.outcome
            assert (photo.confidence, photo.margin, photo.loss) == pytest.approx((row.confidence, row.margin, row.loss))
            assert photo.probabilities.sum() == pytest.approx(1)
            assert photo.true_probability == pytest.approx(photo.probabilities[gallery.classes.index(row.label)])
            assert (photo.decision is None) == (row.review == "unreviewed")


@pytest.mark.parametrize("name", ["nothing.jpg", "a\0b", "half \udcff", ""])
def test_an_unknown_photo_is_not_found(gallery: SimpleNamespace, name: str) -> None:
    with gallery.database.read() as connection, pytest.raises(RecordNotFoundError):
        PredictionQuery(connection, EVERYTHING).find(name)


@pytest.mark.parametrize("version", ["v9", "", "a\0b", "half \udcff"])
def test_an_unknown_model_is_not_found(database: Database, version: str) -> None:
    with database.read() as connection, pytest.raises(RecordNotFoundError):
        PredictionQuery(connection, Filter(model=version))


def test_an_unknown_class_is_rejected(gallery: SimpleNamespace) -> None:
    for requested in (EVERYTHING.replace(labels=("birds",)), EVERYTHING.replace(predicted=("birds",))):
        expected = r"'birds'\. The classes of the model are"
        with gallery.database.read() as connection, pytest.raises(InvalidFilterError, match=expected):
            PredictionQuery(connection, requested)


@pytest.mark.parametrize(("stored", "requested"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_match_in_any_unicode_form(tmp_path: Path, new_database: NewDatabase, stored: Form, requested: Form) -> None:
    def stored_as(text: str) -> str:
        return unicodedata.normalize(stored, text)

    table = make_predictions(1, 40, (stored_as("bébé"), "dogs"))
    table = replace(table, image_names=tuple(map(stored_as, table.image_names)))
    with new_database("sqlite") as url, closing(Database(url)) as database:
        rows = import_table(database, table, tmp_path)
        name = unicodedata.normalize(requested, "bébé")
        with database.read() as connection:
            labeled = PredictionQuery(connection, EVERYTHING.replace(labels=(name,)))
            predicted = PredictionQuery(connection, EVERYTHING.replace(predicted=(name,)))
            assert labeled.counts.total == sum(row.label == stored_as("bébé") for row in rows) > 0
            assert predicted.counts.total == sum(row.predicted == stored_as("bébé") for row in rows) > 0
            row = next(row for row in rows if row.photo.endswith(stored_as("Ä.jpg")))
            photo = labeled.find(unicodedata.normalize(requested, row.photo))
            assert photo.photo == row.photo
        words = {"photo": row.photo, "sha256": row.sha256, "model_version": VERSION}
        with database.write() as connection:
            save_decision(connection, ReviewDecision(**words, decision="label", new_label=name))  # type: ignore[arg-type]
            (saved,) = load_history(connection, row.sha256)
            assert saved.new_label == stored_as("bébé")
        check_buckets(database)


def test_a_table_is_imported_once(database: Database, tmp_path: Path) -> None:
    gallery = fill(database, CLASSES[5], tmp_path)
    message = make_predictions(1, PHOTOS, gallery.classes)
    import_table(gallery.database, message, tmp_path)
    with gallery.database.read() as connection:
        assert PredictionQuery(connection, EVERYTHING).model_total == len(gallery.rows)
        assert connection.execute(select(func.count()).select_from(imports)).scalar_one() == 2
    again = make_predictions(1, PHOTOS, gallery.classes)
    probabilities = again.probabilities[:, ::-1].copy()
    again = type(again)(again.classes, again.image_names, again.labels, probabilities, again.splits, again.sha256s)
    import_table(gallery.database, again, tmp_path)  # another evaluation of the same photos: the first one stays
    with gallery.database.read() as connection:
        listing = PredictionQuery(connection, EVERYTHING)
        assert listing.model_total == len(gallery.rows)
        assert listing.counts.confusion == Counter((row.label, row.predicted) for row in gallery.rows)
    check_buckets(gallery.database)


def test_concurrent_imports_of_a_table_store_it_once(database: Database, database_url: str, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import tests.helpers.gallery_rows as g;"
        "from service.db.connection import Database; d = Database(sys.argv[1]);"
        "table = g.make_predictions(1, 300, g.CLASSES[2]); sys.stdin.read(1); g.import_table(d, table, Path(sys.argv[2]))"
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, database_url, folder], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for folder in folders
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    message = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], message
    with database.read() as connection:
        assert [model.version for model in list_models(connection)] == [VERSION]
        assert connection.execute(select(imports.c.images)).scalars().all() == [300]
        assert connection.execute(select(func.count()).select_from(predictions)).scalar_one() == 300
    check_buckets(database)


def test_a_failed_import_stores_nothing(database: Database, tmp_path: Path) -> None:
    message = make_predictions(1, 50, CLASSES[2])
    broken = type(message)(
        message.classes,
        message.image_names,
        message.labels,
        message.probabilities,
        message.splits,
        (*message.sha256s[:-1], "no hash"),
    )
    with pytest.raises(ValueError, match="no hash"):
        import_table(database, broken, tmp_path)
    with database.read() as connection:
        assert list_models(connection) == []
        assert connection.execute(select(func.count()).select_from(predictions)).scalar_one() == 0


def test_models_are_listed_newest_first(database: Database, tmp_path: Path) -> None:
    for number, classes in enumerate(CLASSES.values(), 1):
        import_table(database, make_predictions(number, 10, classes), tmp_path, version=f"v{number}")
    with database.read() as connection:
        assert [(model.version, model.name, model.classes) for model in list_models(connection)] == [
            ("v2", "model v2", CLASSES[5]),
            ("v1", "model v1", CLASSES[2]),
        ]
        assert get_model(connection, "v1").classes == CLASSES[2]


def test_an_empty_table_has_no_photos(database: Database, tmp_path: Path) -> None:
    import_table(database, make_predictions(1, 0, CLASSES[2]), tmp_path)
    with database.read() as connection:
        listing = PredictionQuery(connection, EVERYTHING)
        assert (listing.counts.total, listing.page_count, listing.page(1), listing.fetch(listing.ids())) == (0, 1, [], [])


def test_a_later_evaluation_adds_label_issues_to_known_photos(database: Database) -> None:
    """The validation photos of a bundle are evaluated again by ``finetune evaluate --folds``."""
    message = make_predictions(3, 40, CLASSES[2])
    none = np.zeros(40, dtype=np.bool_)
    some = none.copy()
    some[[4, 30]] = True
    suspected = Filter(model=VERSION, flags=("mislabeled",))
    with database.write() as connection:
        model = get_or_create_model(connection, version=VERSION, name="one", classes=CLASSES[2])
        assert import_predictions(connection, model, EvaluationTable("evaluation", "a", message, none, none, none)) == 40
    with database.read() as connection:
        assert PredictionQuery(connection, suspected).counts.total == 0
    for digest in ("b", "c"):  # the second time there is nothing to change
        with database.write() as connection:
            assert import_predictions(connection, model, EvaluationTable("out-of-fold", digest, message, none, some, none)) == 0
        with database.read() as connection:
            found = PredictionQuery(connection, suspected).page(1)
        assert sorted(photo.photo for photo in found) == sorted(encode_file_name(message.image_names[i]) for i in (4, 30))
        assert {photo.source for photo in found} == {"evaluation"}
        check_buckets(database)
