"""One decision about many photos: guarded photo by photo, saved in one transaction, and undone as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UserError
from service.db.connection import Database
from service.db.errors import InvalidReviewError, NothingToUndoError, RecordNotFoundError
from service.db.filter import Filter
from service.db.query import PredictionQuery, ViewVersion
from service.reviews.batch import (
    BatchDecision,
    BatchResult,
    SelectedPhoto,
    describe_left,
    save_batch,
    select_matching,
    summarize_batch,
    undo_batch,
)
from service.reviews.decisions import ReviewDecision, list_reviews, load_history, save_decision
from tests.helpers.gallery_rows import CLASSES, VERSION, ExpectedRow, check_buckets, import_table, make_predictions

pytestmark = pytest.mark.slow

PHOTOS = 1_100  # more than one statement takes


@pytest.fixture
def photos(database: Database, tmp_path: Path) -> list[ExpectedRow]:
    return import_table(database, make_predictions(1, PHOTOS, CLASSES[2]), tmp_path)


def selected(row: ExpectedRow, version: int | None = None) -> SelectedPhoto:
    return SelectedPhoto(row.photo, row.sha256, version)


def save(database: Database, decision: str, photos: list[SelectedPhoto], **more: Any) -> BatchResult:
    with database.write() as connection:
        return save_batch(connection, BatchDecision(model_version=VERSION, decision=decision, **more), photos)


def review(database: Database, row: ExpectedRow, decision: str, version: int | None = None) -> int:
    """Review one photo as another reviewer."""
    with database.write() as connection:
        one = ReviewDecision(
            photo=row.photo,
            sha256=row.sha256,
            model_version=VERSION,
            decision=decision,
            reviewer="Ben",
            expected_version=version,
        )
        return save_decision(connection, one)


def states(database: Database) -> dict[str, tuple[str, str | None]]:
    """Return the review state and the new label of every photo."""
    with database.read() as connection:
        query = PredictionQuery(connection, Filter(model=VERSION))
        return {photo.photo: (photo.review, photo.decision and photo.decision.new_label) for photo in query.fetch(query.ids())}


def test_a_batch_is_saved_and_undone_as_a_whole(database: Database, photos: list[ExpectedRow]) -> None:
    before = states(database)
    result = save(database, "label", [selected(row) for row in photos], new_label="dogs", reviewer="Ann", note="fur")
    assert (result.saved, result.left) == (PHOTOS, [])
    expected = {row.photo: ("confirmed" if row.label == "dogs" else "relabeled", "dogs") for row in photos}
    assert states(database) == expected
    check_buckets(database)
    assert result.batch is not None
    with database.read() as connection:
        assert len(list_reviews(connection)) == PHOTOS
        summary = summarize_batch(connection, result.batch)
        assert summary is not None
        assert (summary.text, summary.photos, summary.can_undo) == ("Labeled 1,100 photos dogs.", PHOTOS, True)
        [entry] = load_history(connection, photos[0].sha256)
        assert (entry.reviewer, entry.note, entry.new_label, entry.batch) == ("Ann", "fur", "dogs", result.batch)
    with database.write() as connection:
        undone = undo_batch(connection, result.batch, reviewer="Ann")
    assert (undone.saved, undone.left) == (PHOTOS, [])
    assert states(database) == before
    check_buckets(database)
    with database.write() as connection:
        assert [row.decision for row in load_history(connection, photos[0].sha256)] == ["undo", "label"]
        again = summarize_batch(connection, result.batch)
        assert again is not None
        assert not again.can_undo
        for batch in (result.batch, undone.batch, 10**9):
            with pytest.raises(NothingToUndoError):
                undo_batch(connection, batch or 0)


def test_photos_that_someone_else_reviewed_in_the_meantime_are_left(database: Database, photos: list[ExpectedRow]) -> None:
    first, second, third, *rest = photos[:40]
    versions = {first.photo: review(database, first, "bad"), second.photo: review(database, second, "neither")}
    review(database, second, "undo", versions[second.photo])
    shown = [selected(row, None if row is second else versions.get(row.photo)) for row in photos[:40]]
    newer = [review(database, third, "bad"), review(database, first, "neither", versions[first.photo])]
    result = save(database, "keep", shown)
    assert result.saved == 38
    assert [(photo.photo, photo.reason, photo.version) for photo in result.left] == [
        (first.photo, "reviewed", newer[1]),
        (third.photo, "reviewed", newer[0]),
    ]
    expected = "2 of 40 were reviewed by someone else in the meantime and left as they are."
    assert describe_left(result.left_counts, 40) == expected
    after = states(database)
    assert (after[first.photo][0], after[third.photo][0]) == ("neither", "bad")
    assert all(after[row.photo] == ("confirmed", row.label) for row in (second, *rest))
    # An undo leaves what was reviewed after the batch.
    with database.read() as connection:
        version = load_history(connection, second.sha256)[0].id
    review(database, second, "bad", version)
    assert result.batch is not None
    with database.write() as connection:
        undone = undo_batch(connection, result.batch)
    assert (undone.saved, [photo.photo for photo in undone.left]) == (37, [second.photo])
    assert states(database)[second.photo] == ("bad", None)
    check_buckets(database)


def test_each_photo_is_labeled_as_predicted(database: Database, photos: list[ExpectedRow]) -> None:
    save(database, "predicted", [selected(row) for row in photos[:60]])
    after = states(database)
    assert all(after[row.photo][1] == row.predicted for row in photos[:60])
    assert {after[row.photo][0] for row in photos[:60]} == {"confirmed", "relabeled"}


def test_a_photo_with_two_labels_or_no_prediction_is_left(database: Database, tmp_path: Path) -> None:
    table = make_predictions(2, 8, CLASSES[2])
    sha256s = list(table.sha256s)
    sha256s[1] = sha256s[0]
    sha256s[3] = sha256s[2]
    labels = np.array([0, 1, 1, 1, 0, 0, 0, 0])
    copies = type(table)(table.classes, table.image_names, labels, table.probabilities, table.splits, tuple(sha256s))
    rows = import_table(database, copies, tmp_path)
    unknown = SelectedPhoto("valid/none.jpg", "0" * 64)
    result = save(database, "keep", [*map(selected, rows), unknown])
    assert result.saved == 6
    assert sorted((photo.photo, photo.reason) for photo in result.left) == sorted(
        [(rows[0].photo, "ambiguous"), (rows[1].photo, "ambiguous"), ("valid/none.jpg", "missing")]
    )
    with database.read() as connection:
        assert len(load_history(connection, sha256s[2])) == 1  # copies share one decision
    assert describe_left(result.left_counts, 9) == (
        "2 of 9 were stored twice with different labels, 1 of 9 was not among the predictions of the model and left as they "
        "are."
    )
    check_buckets(database)


def test_all_photos_of_a_filter_are_those_that_the_reviewer_saw(
    database: Database, photos: list[ExpectedRow], tmp_path: Path
) -> None:
    filters = Filter(model=VERSION, outcomes=("incorrect",), reviews=("unreviewed",))
    with database.read() as connection:
        view = ViewVersion.parse(str(ViewVersion.load(connection)))
        query = PredictionQuery(connection, filters)
        shown = [photo.photo for photo in query.fetch(query.ids())]
    mistakes = [row for row in photos if row.outcome == "incorrect"]
    assert len(shown) == len(mistakes) > 100
    undone = review(database, mistakes[0], "bad")
    review(database, mistakes[0], "undo", undone)  # matches again, but was changed
    review(database, mistakes[1], "bad")  # matches no more
    import_table(database, make_predictions(9, 300, CLASSES[2]), tmp_path, seed=9)  # arrived later
    with database.write() as connection:
        matching = select_matching(PredictionQuery(connection, filters), view)
        assert {photo.photo for photo in matching} == set(shown) - {mistakes[1].photo}
        result = save_batch(connection, BatchDecision(model_version=VERSION, decision="neither"), matching)
    assert result.saved == len(shown) - 2
    assert [(photo.photo, photo.reason) for photo in result.left] == [(mistakes[0].photo, "reviewed")]


@pytest.mark.parametrize(
    ("decision", "fields", "error"),
    [
        ("note", {}, InvalidReviewError),
        ("label", {"new_label": "wolf"}, InvalidReviewError),
        ("bad", {"note": "\0"}, InvalidReviewError),
        ("bad", {"model_version": "other"}, RecordNotFoundError),
    ],
)
def test_an_invalid_batch_saves_nothing(
    database: Database, photos: list[ExpectedRow], decision: str, fields: dict[str, str], error: type[UserError]
) -> None:
    words: dict[str, Any] = {"model_version": VERSION, "decision": decision} | fields
    with database.write() as connection, pytest.raises(error):
        save_batch(connection, BatchDecision(**words), [selected(photos[0])])
    assert {state for state, _ in states(database).values()} == {"unreviewed"}
