"""Decisions of reviewers: saved, undone, never lost, and never replaced without a conflict."""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from models.artifacts.reviews import read_reviews, write_reviews
from models.errors import UserError
from service.db.connection import Database
from service.db.errors import InvalidReviewError, NothingToUndoError, RecordNotFoundError, ReviewConflictError
from service.db.filter import UNLABELED, Filter
from service.db.ingest import DIMENSIONS, resolve_label
from service.db.production import ServedPrediction, production_name, prune, save_predictions
from service.db.query import PredictionQuery, list_models
from service.db.schema import buckets, current_reviews, decisions, models, predictions
from service.http.errors import problem_from
from service.reviews.decisions import (
    ReviewDecision,
    apply_decisions,
    current_decision,
    list_reviews,
    load_history,
    save_decision,
    saved_message,
)
from tests.helpers.gallery_rows import (
    CLASSES,
    VERSION,
    ExpectedRow,
    check_buckets,
    count_buckets,
    import_table,
    make_predictions,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
KILLED_AFTER = 25


@pytest.fixture
def photos(database: Database, tmp_path: Path) -> list[ExpectedRow]:
    return import_table(database, make_predictions(1, 60, CLASSES[2]), tmp_path)


def decide(database: Database, photo: ExpectedRow, decision: str, label: str | None = None, /, **more: Any) -> int:
    """Save a decision based on the current one, or on ``expected_version``. Returns its id."""
    with database.write() as connection:
        current = current_decision(connection, photo.sha256)
        words = {
            "photo": photo.photo,
            "sha256": photo.sha256,
            "model_version": VERSION,
            "expected_version": current and current.id,
        }
        return save_decision(connection, ReviewDecision(**words | {"new_label": label} | more, decision=decision))


def rejected(database: Database, photo: ExpectedRow, decision: str, /, **more: Any) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        decide(database, photo, decision, **more)
    problem = problem_from(caught.value)
    assert problem
    return problem.code, problem.detail


def state(database: Database, photo: ExpectedRow) -> tuple[str, str | None]:
    """Return the state of the review and the current label."""
    with database.read() as connection:
        found = PredictionQuery(connection, Filter(model=VERSION)).find(photo.photo)
        return found.review, found.decision and found.decision.new_label


def test_decide_undo_and_undo_again(database: Database, photos: list[ExpectedRow]) -> None:
    photo = next(row for row in photos if row.label == "cats")
    first = decide(database, photo, "label", "dogs", reviewer="Ann", note="has a tail", key_name="key-1")
    assert state(database, photo) == ("relabeled", "dogs")
    second = decide(database, photo, "label", "cats", reviewer="Ben")
    assert state(database, photo) == ("confirmed", "cats")
    third = decide(database, photo, "bad")
    assert state(database, photo) == ("bad", None)
    for undone, left in ((third, ("confirmed", "cats")), (second, ("relabeled", "dogs")), (first, ("unreviewed", None))):
        id_ = decide(database, photo, "undo", reviewer="Cid")
        with database.read() as connection:
            assert load_history(connection, photo.sha256)[0].id == id_
            assert load_history(connection, photo.sha256)[0].undoes == undone
        assert state(database, photo) == left
    assert rejected(database, photo, "undo") == (
        "nothing_to_undo",
        f"{photo.photo} has no review to undo.",
    )
    decide(database, photo, "neither")
    assert state(database, photo) == ("neither", None)
    with database.read() as connection:
        rows = load_history(connection, photo.sha256)
    assert [row.decision for row in rows] == ["neither", "undo", "undo", "undo", "bad", "label", "label"]
    eldest = rows[-1]
    assert (eldest.reviewer, eldest.note, eldest.key_name, eldest.label) == ("Ann", "has a tail", "key-1", "cats")
    assert abs(eldest.decided_at - datetime.now(timezone.utc)) < timedelta(minutes=10)
    check_buckets(database)


def test_a_note_changes_nothing_and_conflicts_with_nothing(database: Database, photos: list[ExpectedRow]) -> None:
    photo = photos[0]
    decide(database, photo, "note", note="look again\nÄ 猫")
    assert state(database, photo) == ("unreviewed", None)
    decide(database, photo, "bad")
    decide(database, photo, "note", note="really", expected_version=None)
    assert state(database, photo) == ("bad", None)
    decide(database, photo, "undo")
    assert state(database, photo) == ("unreviewed", None)
    with database.read() as connection:
        assert [row.note for row in load_history(connection, photo.sha256)] == ["", "really", "", "look again\nÄ 猫"]


def test_a_decision_on_an_outdated_version_conflicts(database: Database, photos: list[ExpectedRow]) -> None:
    photo = photos[0]
    seen = decide(database, photo, "label", "dogs", reviewer="Ann")
    found = rejected(database, photo, "bad", expected_version=None)
    change = "confirmed" if photo.label == "dogs" else "relabeled to"
    assert found == ("review_conflict", f"Ann has just {change} dogs. Check it, then overwrite it if needed.")
    assert rejected(database, photo, "undo", expected_version=None)[0] == "review_conflict"
    decide(database, photo, "neither", reviewer="")
    assert (
        "Anonymous has just marked as none of the classes."
        in rejected(database, photo, "label", new_label="cats", expected_version=seen)[1]
    )
    decide(database, photo, "undo")
    decide(database, photo, "undo", expected_version=seen)
    assert "The review was just undone." in rejected(database, photo, "bad", expected_version=seen)[1]
    with database.read() as connection:
        assert len(load_history(connection, photo.sha256)) == 4


@pytest.mark.parametrize(
    "words",
    [{"photo": "none.jpg"}, {"sha256": "0" * 64}, {"model_version": "v9"}, {"photo": "a\0"}, {"model_version": "\udcff"}],
)
def test_a_decision_on_an_unevaluated_photo_is_rejected(
    database: Database, photos: list[ExpectedRow], words: dict[str, str]
) -> None:
    assert rejected(database, photos[0], "bad", **words)[0] == "not_found"


@pytest.mark.parametrize(
    ("decision", "words", "output"),
    [
        ("maybe", {}, "Invalid `decision`: 'maybe'. Valid values: label, neither, bad, note, undo."),
        ("", {}, "Invalid `decision`: ''."),
        ("label", {}, "Invalid `new_label`: None. Valid values: cats, dogs."),
        ("label", {"new_label": "wolf"}, "Invalid `new_label`: 'wolf'. Valid values: cats, dogs."),
        ("note", {"note": " \n"}, "The field `note` is empty."),
    ],
)
def test_an_invalid_decision_is_rejected(
    database: Database, photos: list[ExpectedRow], decision: str, words: dict[str, str], output: str
) -> None:
    code, detail = rejected(database, photos[0], decision, **words)
    assert (code, output in detail) == ("bad_parameter", True)
    assert state(database, photos[0]) == ("unreviewed", None)
    with database.read() as connection:
        assert load_history(connection, photos[0].sha256) == []


@pytest.mark.parametrize("words", [{"note": "a\0b"}, {"reviewer": "\ud800"}, {"new_label": "a\0"}])
def test_text_that_cannot_be_stored_is_rejected(database: Database, photos: list[ExpectedRow], words: dict[str, str]) -> None:
    code, detail = rejected(database, photos[0], "label", **words)
    assert code == "bad_parameter"
    assert "contains a NUL character or an unpaired surrogate" in detail


def test_of_two_concurrent_decisions_one_conflicts(database: Database, photos: list[ExpectedRow]) -> None:
    together = threading.Barrier(8, timeout=300)
    codes: Counter[str] = Counter()

    def work(number: int) -> None:
        together.wait()
        try:
            decide(database, photos[0], "label", "dogs", reviewer=str(number), expected_version=None)
            codes["decided"] += 1
        except ReviewConflictError:
            codes["conflict"] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {"decided": 1, "conflict": 7}
    with database.read() as connection:
        assert len(load_history(connection, photos[0].sha256)) == 1
    check_buckets(database)


def test_decisions_apply_to_a_later_model_with_other_classes(
    database: Database, photos: list[ExpectedRow], tmp_path: Path
) -> None:
    """Decisions belong to the photo, not to the model. A class that a later model lacks counts as another class."""
    to_dogs, to_cats, neither = photos[:3]
    decide(database, to_dogs, "label", "dogs")
    decide(database, to_cats, "label", "cats")
    decide(database, neither, "neither")
    names = ("dogs", "foxes")
    later = make_predictions(1, 60, names)
    import_table(database, later, tmp_path, version="v2")
    with database.read() as connection:
        listing = PredictionQuery(connection, Filter(model="v2"))
        found = {photo.sha256: photo for photo in listing.fetch(listing.ids())}
        of_dogs, of_cats, of_neither = (found[photo.sha256] for photo in (to_dogs, to_cats, neither))
        assert of_dogs.review == ("confirmed" if of_dogs.label == "dogs" else "relabeled")
        assert (of_cats.review, of_cats.decision and of_cats.decision.new_label) == ("relabeled", "cats")
        assert of_neither.review == "neither"
        assert listing.counts.facets["review"]["unreviewed"] == 57
    decide(database, neither, "undo")
    with database.read() as connection:
        assert PredictionQuery(connection, Filter(model="v2")).counts.facets["review"]["unreviewed"] == 58
    check_buckets(database)


def test_a_decision_applies_to_every_photo_with_the_same_bytes(database: Database, tmp_path: Path) -> None:
    output = make_predictions(1, 20, CLASSES[2])
    copies = type(output)(
        output.classes, output.image_names, output.labels, output.probabilities, output.splits, (output.sha256s[0],) * 20
    )
    rows = import_table(database, copies, tmp_path)
    decide(database, rows[3], "label", "cats")
    with database.read() as connection:
        counts = PredictionQuery(connection, Filter(model=VERSION)).counts
    cats = sum(row.label == "cats" for row in rows)
    assert counts.facets["review"] == {"confirmed": cats, "relabeled": 20 - cats}
    check_buckets(database)


def test_the_rows_of_reviews_csv(database: Database, photos: list[ExpectedRow]) -> None:
    chosen = random.Random(1).sample(photos, 10)
    for photo in chosen:
        decide(database, photo, "label", "dogs", reviewer="Ann", note="n")
    decide(database, chosen[0], "undo")
    with database.read() as connection:
        rows = list(list_reviews(connection))
    expected = sorted((photo.photo, photo.sha256, photo.label, "label", "dogs", "n", "Ann") for photo in chosen[1:])
    assert [(r.photo, r.sha256, r.label, r.decision, r.new_label, r.note, r.reviewer) for r in rows] == expected


def test_notes_are_exported_with_the_review_or_alone(database: Database, photos: list[ExpectedRow]) -> None:
    reviewed, noted, undone = sorted(photos[:3], key=lambda row: row.photo)
    decide(database, reviewed, "bad", note="blurred")
    decide(database, reviewed, "note", note="really", reviewer="Ben")
    decide(database, noted, "note", note="first")
    decide(database, noted, "note", note="second", reviewer="Ann")
    decide(database, undone, "bad", note="gone")
    decide(database, undone, "undo")
    with database.read() as connection:
        reviews = list_reviews(connection)
    assert [(r.photo, r.decision, r.note) for r in reviews] == [
        (reviewed.photo, "bad", "blurred\nreally"),
        (noted.photo, "note", "first\nsecond"),
    ]
    table = write_reviews(reviews)
    assert [review.photo for review in read_reviews(table, origin="reviews.csv")] == [reviewed.photo]


def test_an_undo_returns_the_note_of_the_decision(database: Database, photos: list[ExpectedRow]) -> None:
    decide(database, photos[0], "bad", note="blurred")
    id_ = decide(database, photos[0], "undo")
    with database.read() as connection:
        message = saved_message(connection, str(id_))
    assert message
    assert (message.title, message.is_undo, message.restored_note) == ("Undone", True, "blurred")


def recounted(database: Database, unlike: Mapping[str, bool]) -> dict[str, Counter[tuple[Any, ...]]]:
    """Return the expected buckets, recomputed from the predictions and the history of decisions.

    ``unlike`` states for each photo whether it is unlike the training images.
    """
    found: dict[str, Counter[tuple[Any, ...]]] = {}
    with database.read() as connection:
        for model in list_models(connection):
            found[model.version] = Counter()
            rows = connection.execute(
                select(predictions.c.photo, predictions.c.sha256, *(buckets.c[name] for name in DIMENSIONS))
                .join(buckets, buckets.c.id == predictions.c.bucket_id)
                .join(models, models.c.id == predictions.c.model_id)
                .where(models.c.id == model.id)
            )
            for row in rows.all():
                stack: list[Any] = []
                for output in reversed(load_history(connection, row.sha256)):
                    if output.decision == "undo":
                        stack.pop()
                    elif output.decision != "note":
                        stack.append(output)
                review = stack[-1] if stack else None
                held = connection.execute(select(current_reviews).where(current_reviews.c.sha256 == row.sha256)).first()
                assert (held and held.decision_id) == (review and review.id)
                label, after = resolve_label(
                    review, label=row.label, predicted=row.predicted, classes=model.classes, source=row.source
                )
                name = UNLABELED if label < 0 else model.classes[label]
                place = (row.source, row.split, name, model.classes[row.predicted], row.percent, after)
                found[model.version][(*place, row.duplicate, row.mislabeled, unlike[row.photo])] += 1
    return found


def test_buckets_stay_correct_after_random_operations(database: Database, tmp_path: Path) -> None:
    """Import, save, review, undo and delete in a random order. A recount gives the same buckets."""
    rng = random.Random(11)
    classes = CLASSES[2]
    evaluated = import_table(database, make_predictions(1, 40, classes), tmp_path)
    places = [(row.photo, row.sha256) for row in evaluated]
    unlike = {row.photo: row.unlike for row in evaluated}
    before: list[Any] = []
    for step in range(500):
        kind = rng.choices(("decide", "undo", "note", "keep", "prune", "import"), (50, 15, 5, 20, 2, 1))[0]
        with database.write() as connection:
            if kind in ("decide", "undo", "note"):
                photo, sha256 = rng.choice(places)
                decision = rng.choice(("label", "label", "neither", "bad")) if kind == "decide" else kind
                current = current_decision(connection, sha256)
                label = rng.choice((*classes, "foxes")) if decision == "label" else None
                words = {"photo": photo, "sha256": sha256, "model_version": VERSION, "decision": decision, "new_label": label}
                with contextlib.suppress(InvalidReviewError, NothingToUndoError, RecordNotFoundError):
                    save_decision(connection, ReviewDecision(**words, expected_version=current and current.id))  # type: ignore[arg-type]
            elif kind == "keep":
                number = rng.randrange(30)
                data, is_unlike = bytes([number]), number % 3 == 0
                sha256 = hashlib.sha256(data).hexdigest()
                received_at = datetime.now(timezone.utc) - timedelta(seconds=step)
                values = np.array([0.25, 0.75], dtype=np.float32)
                for model in rng.sample(list_models(connection), 1):
                    if model.classes == classes:
                        arrived = ServedPrediction(data, sha256, values, received_at, unlike=is_unlike)
                        save_predictions(connection, model.id, classes, [arrived])
                        places.append((production_name(sha256), sha256))
                        unlike[production_name(sha256)] = is_unlike
            elif kind == "prune":
                prune(connection, max_images=rng.randrange(5, 15), max_bytes=10**9, days=1)
        if kind == "import":
            version = f"v{rng.randrange(2, 5)}"
            names = classes if version == "v2" else ("dogs", "foxes")
            import_table(database, make_predictions(1, 40, names), tmp_path, version=version)
        if step % 25 == 24:
            with database.read() as connection:
                output = connection.execute(select(decisions).order_by(decisions.c.id)).all()
            assert output[: len(before)] == before, "the history is only ever added to"
            before = list(output)
    check_buckets(database)
    assert len(before) > 200
    states = count_buckets(database)
    assert states == recounted(database, unlike)
    assert len({place[5] for cells_of in states.values() for place in cells_of}) == 5
    assert {(place[0], place[8]) for cells_of in states.values() for place in cells_of} == {
        (source, flag) for source in ("evaluation", "production") for flag in (False, True)
    }
    with database.write() as connection:
        for _, sha256 in places:
            apply_decisions(connection, [sha256])
    assert count_buckets(database) == states
    check_buckets(database)


def test_every_acknowledged_decision_survives_a_kill(database: Database, database_url: str, photos: list[ExpectedRow]) -> None:
    program = (
        "import itertools, sys; from service.db.connection import Database;"
        "from service.reviews.decisions import ReviewDecision, current_decision, save_decision\n"
        "database = Database(sys.argv[1])\n"
        "for number in itertools.count():\n"
        "    photo, sha256 = sys.argv[2 + number % 20].split('|')\n"
        "    with database.write() as connection:\n"
        "        current = current_decision(connection, sha256)\n"
        "        decision = ReviewDecision(photo=photo, sha256=sha256, model_version='v1', decision='label',\n"
        "                          new_label='dogs', note=str(number), expected_version=current and current.id)\n"
        "        made = save_decision(connection, decision)\n"
        "    print(made, number, flush=True)\n"
    )
    words = [f"{photo.photo}|{photo.sha256}" for photo in photos[:20]]
    process = subprocess.Popen([sys.executable, "-c", program, database_url, *words], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline() for _ in range(KILLED_AFTER)]
    process.kill()
    acknowledged += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    whole = [tuple(map(int, line.split())) for line in acknowledged if line.endswith(b"\n")]
    assert len(whole) >= KILLED_AFTER
    with database.read() as connection:
        found = {row.id: int(row.note) for row in connection.execute(select(decisions))}
        held = set(connection.execute(select(current_reviews.c.decision_id)).scalars())
    assert {id_: found.get(id_) for id_, _ in whole} == dict(whole)
    assert len(found) - len(whole) in (0, 1)  # one more may have been written and not acknowledged
    assert held == set(sorted(found)[-20:])
    check_buckets(database)
