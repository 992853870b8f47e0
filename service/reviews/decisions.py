"""Save what people decide about photos. The history is append-only; the last decision that was not undone is current."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, delete, insert, select

from models.artifacts.reviews import COLUMNS, DECISIONS, LABEL, NOTE, Review
from models.errors import list_names
from service.db.errors import InvalidReviewError, NothingToUndoError, RecordNotFoundError, ReviewConflictError
from service.db.ingest import PREDICTION_COLUMNS, BucketWriter, production_loss, resolve_label
from service.db.schema import buckets, current_reviews, decisions, models, predictions
from service.db.text import is_storable, match_name

ACTIONS = (*DECISIONS, NOTE, "undo")
ANONYMOUS = "Anonymous"
CHUNK = 500  # photos per statement
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ReviewDecision:
    """A reviewer's decision, note or undo.

    ``decision`` is one of ACTIONS; a note changes no review. ``expected_version`` is the id of the current decision that the
    reviewer saw, None if there was none, so that a decision is not overwritten unseen.
    """

    photo: str
    sha256: str
    model_version: str
    decision: str
    new_label: str | None = None
    note: str = ""
    reviewer: str = ""
    key_name: str | None = None
    expected_version: int | None = None


@dataclass(frozen=True)
class HistoryEntry:
    """A line of a photo's history, like "Ann" "relabeled to dogs"."""

    id: int
    reviewer: str
    text: str
    note: str
    decided_at: datetime
    is_undone: bool


@dataclass(frozen=True)
class SavedMessage:
    """What was just saved about a photo.

    ``undo`` is the id of the decision that can be undone, and ``restored_note`` the note of one that was undone.
    """

    title: str
    photo: str
    sha256: str
    text: str
    undo: int | None = None
    is_undo: bool = False
    restored_note: str = ""

    @property
    def file(self) -> str:
        return self.photo.rpartition("/")[2]


def save_decision(connection: Connection, decision: ReviewDecision) -> int:
    """Save a decision and update all predictions of the photo.

    Returns:
        The id of the decision.

    Raises:
        InvalidReviewError: The decision or the label is unknown, the note is empty, or a text cannot be stored.
        RecordNotFoundError: The model has no prediction for the photo.
        ReviewConflictError: Another reviewer decided in the meantime.
        NothingToUndoError: There is no review to undo.
    """
    if decision.decision not in ACTIONS:
        raise InvalidReviewError(f"Invalid `decision`: {decision.decision[:80]!r}. Valid values: {', '.join(ACTIONS)}.")
    if decision.decision == NOTE and not decision.note.strip():
        raise InvalidReviewError("The field `note` is empty. Enter a note, or choose a decision.")
    if not is_storable(decision.new_label or "", decision.note, decision.reviewer):
        raise InvalidReviewError("A text contains a NUL character or an unpaired surrogate. Remove it.")
    label, new_label = _resolve_labels(connection, decision)
    current = current_decision(connection, decision.sha256)
    if decision.decision != NOTE and decision.expected_version != (current.id if current else None):
        change = f"{current.reviewer or ANONYMOUS} has just {describe_decision(current)}" if current else None
        raise ReviewConflictError(f"{change or 'The review was just undone'}. Check it, then overwrite it if needed.")
    undoes = None
    if decision.decision == "undo":
        if current is None:
            raise NothingToUndoError(f"{decision.photo} has no review to undo.")
        undoes = current.id
    saved = connection.execute(
        insert(decisions).values(
            sha256=decision.sha256,
            photo=decision.photo,
            label=label,
            decision=decision.decision,
            new_label=new_label,
            note=decision.note,
            reviewer=decision.reviewer,
            key_name=decision.key_name,
            model_version=decision.model_version,
            undoes=undoes,
            decided_at=datetime.now(timezone.utc),
        )
    )
    if decision.decision != NOTE:
        update_current_reviews(connection, [decision.sha256])
    return int(saved.inserted_primary_key[0])  # type: ignore[index]


def current_decision(connection: Connection, sha256: str) -> Row[Any] | None:
    """Return the current decision on a photo: the last one that is not a note and was not undone."""
    return current_decisions(connection, [sha256]).get(sha256)


def current_decisions(connection: Connection, sha256s: Sequence[str]) -> dict[str, Row[Any]]:
    """Return the current decision on each of some photos that has one, by sha256."""
    found: dict[str, Row[Any]] = {}
    for chunk in chunks(sha256s):
        undone = select(decisions.c.undoes).where(decisions.c.sha256.in_(chunk), decisions.c.undoes.is_not(None))
        effective = select(decisions).where(
            decisions.c.sha256.in_(chunk), decisions.c.decision.in_(DECISIONS), decisions.c.id.not_in(undone)
        )
        found |= {row.sha256: row for row in connection.execute(effective.order_by(decisions.c.id))}
    return found


def load_history(connection: Connection, sha256: str) -> list[Row[Any]]:
    """Load all entries of a photo's history, the newest first."""
    return list(connection.execute(select(decisions).where(decisions.c.sha256 == sha256).order_by(decisions.c.id.desc())))


def list_reviews(connection: Connection) -> list[Review]:
    """Load the rows of reviews.csv in the order of the photos' names.

    A photo has its current review, and all notes that were saved alone. A photo with such notes but no review has a row with
    the decision ``note``.
    """
    current = connection.execute(select(*(current_reviews.c[name] for name in COLUMNS)))
    reviews = {row.sha256: _review(row) for row in current}
    saved_notes = select(*(decisions.c[name] for name in COLUMNS)).where(decisions.c.decision == NOTE)
    for row in connection.execute(saved_notes.order_by(decisions.c.id)):
        known = reviews.get(row.sha256)
        reviews[row.sha256] = replace(known, note=f"{known.note}\n{row.note}".strip()) if known else _review(row)
    return sorted(reviews.values(), key=lambda review: (review.photo, review.sha256))


def _review(row: Row[Any]) -> Review:
    return Review(
        sha256=row.sha256,
        photo=row.photo,
        label=row.label or "",
        decision=row.decision,
        new_label=row.new_label or "",
        note=row.note,
        reviewer=row.reviewer,
        decided_at=row.decided_at.isoformat(timespec="seconds"),
    )


def apply_decisions(connection: Connection, sha256s: Sequence[str]) -> None:
    """Move every prediction of some photos to the bucket that follows from their current reviews."""
    classes = {row.id: row.classes for row in connection.execute(select(models.c.id, models.c.classes))}
    writers = {model_id: BucketWriter(connection, model_id) for model_id in classes}
    columns = *PREDICTION_COLUMNS, predictions.c.sha256, predictions.c.probabilities, predictions.c.model_id
    for chunk in chunks(sha256s):
        rows = connection.execute(select(current_reviews).where(current_reviews.c.sha256.in_(chunk)))
        reviews = {row.sha256: row for row in rows}
        changed: dict[int, list[tuple[Any, dict[str, Any]]]] = {}
        joined = select(*columns).join(buckets, buckets.c.id == predictions.c.bucket_id)
        for row in connection.execute(joined.where(predictions.c.sha256.in_(chunk))).all():
            label, state = resolve_label(
                reviews.get(row.sha256),
                label=row.label,
                predicted=row.predicted,
                classes=classes[row.model_id],
                source=row.source,
            )
            loss = production_loss(row.probabilities, label) if row.source == "production" else row.loss
            new = {"label": label, "review": state, "loss": loss}
            changed.setdefault(row.model_id, []).append((row._mapping, new))
        for model_id, moves in changed.items():
            writers[model_id].move(moves)


def chunks(values: Sequence[Value]) -> Iterator[Sequence[Value]]:
    """Split values into lists that one statement can contain."""
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


def describe_decision(decision: Row[Any]) -> str:
    """Describe a decision without its reviewer: "relabeled to dogs"."""
    if decision.decision == LABEL:
        if decision.new_label == decision.label:
            return f"confirmed {decision.new_label}"
        return f"{'relabeled to' if decision.label else 'labeled'} {decision.new_label}"
    return {
        "neither": "marked as none of the classes",
        "bad": "excluded the photo",
        NOTE: "added a note",
        "undo": "undid",
    }[str(decision.decision)]


def history_entries(rows: Sequence[Row[Any]]) -> list[HistoryEntry]:
    """Describe the rows of ``load_history``."""
    undone = {row.undoes for row in rows if row.undoes}
    texts = {row.id: describe_decision(row) for row in rows}
    return [
        HistoryEntry(
            row.id,
            row.reviewer or ANONYMOUS,
            texts[row.id] + (f": {texts[row.undoes]}" if row.undoes in texts else ""),
            row.note,
            row.decided_at,
            row.id in undone,
        )
        for row in rows
    ]


def saved_message(connection: Connection, id_: str) -> SavedMessage | None:
    """Describe the entry whose id is in a link.

    Returns:
        None if the text is not an id, or if a later decision makes the message outdated.
    """
    row = _get_entry(connection, int(id_)) if id_.isascii() and id_.isdigit() and len(id_) < 19 else None
    if row is None:
        return None
    later = decisions.c.sha256 == row.sha256, decisions.c.id > row.id, decisions.c.decision != NOTE
    if connection.execute(select(decisions.c.id).where(*later).limit(1)).first():
        return None
    photo = row.photo, row.sha256
    if row.decision == NOTE:
        return SavedMessage("Note saved", *photo, "")
    if row.decision != "undo":
        return SavedMessage("Saved", *photo, f"{describe_decision(row)}.", undo=row.id)
    undone, current = _get_entry(connection, row.undoes), current_decision(connection, row.sha256)
    assert undone is not None  # entries are never deleted
    if current:
        text = f"previous review restored: {current.reviewer or ANONYMOUS} {describe_decision(current)}."
    else:
        text = f"review removed; label is {row.label}." if row.label else "review removed; no label."
    return SavedMessage("Undone", *photo, text, is_undo=True, restored_note=undone.note)


def _get_entry(connection: Connection, id_: int) -> Row[Any] | None:
    return connection.execute(select(decisions).where(decisions.c.id == id_)).first()


def update_current_reviews(connection: Connection, sha256s: Sequence[str]) -> None:
    """Derive the current reviews of some photos from their decisions, and apply them to all predictions."""
    current = current_decisions(connection, sha256s)
    for chunk in chunks(sha256s):
        connection.execute(delete(current_reviews).where(current_reviews.c.sha256.in_(chunk)))
    if current:
        rows = [{name: getattr(row, name) for name in COLUMNS} | {"decision_id": row.id} for row in current.values()]
        connection.execute(insert(current_reviews), rows)
    apply_decisions(connection, sha256s)


def _resolve_labels(connection: Connection, decision: ReviewDecision) -> tuple[str | None, str | None]:
    """Return the class that the photo was evaluated with, None for a production photo, and the class that it gets, if any."""
    texts = decision.model_version, decision.photo, decision.sha256
    own = (
        select(buckets.c.label, buckets.c.source, models.c.classes)
        .select_from(predictions)
        .join(buckets, buckets.c.id == predictions.c.bucket_id)
        .join(models, models.c.id == predictions.c.model_id)
        .where(
            models.c.version == decision.model_version,
            predictions.c.photo == decision.photo,
            predictions.c.sha256 == decision.sha256,
        )
    )
    row = is_storable(*texts) and connection.execute(own).first()
    if not row:
        raise RecordNotFoundError(f"The model {decision.model_version} has no prediction for a photo {decision.photo!r}.")
    new_label = match_name(row.classes, decision.new_label or "") if decision.decision == LABEL else None
    if decision.decision == LABEL and new_label is None:
        raise InvalidReviewError(f"Invalid `new_label`: {decision.new_label!r}. Valid values: {list_names(row.classes)}.")
    return None if row.source == "production" else str(row.classes[row.label]), new_label
