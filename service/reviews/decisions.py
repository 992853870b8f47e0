"""What people decide about photos: every decision is kept, the last one that was not taken back holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from models.artifacts.reviews import COLUMNS, DECISIONS, LABEL
from service.db.ingest import PREDICTION_COLUMNS, BucketWriter, production_loss, resolve_label
from service.db.schema import buckets, current_reviews, decisions, models, predictions
from service.http.errors import Problem
from service.http.text_validation import is_storable

ACTIONS = (*DECISIONS, "note", "undo")
ANONYMOUS = "Anonymous"


@dataclass(frozen=True, kw_only=True)
class ReviewDecision:
    """What somebody says about a photo. ``decision`` is one of WORDS, of which a note changes nothing.

    ``expected_version`` is the id of the decision that they saw holding, None where they saw none: another's in between is not
    overruled unseen.
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


def save_decision(connection: Connection, decision: ReviewDecision) -> int:
    """Enter a decision and all that follows from it; returns the id that it got.

    Raises Problem: no such decision, label or photo, an empty note, nothing to undo, somebody decided since, or a text that
    no database takes.
    """
    if decision.decision not in ACTIONS:
        raise Problem("bad_parameter", f"The field `decision` is {decision.decision[:80]!r}; it can be {', '.join(ACTIONS)}.")
    if decision.decision == "note" and not decision.note.strip():
        raise Problem("bad_parameter", "The field `note` is empty; a note was to be saved.")
    if not is_storable(decision.new_label or "", decision.note, decision.reviewer):
        raise Problem("bad_parameter", "A text arrived with a letter that cannot be kept, as a zero byte; leave it out.")
    label = _label_of(connection, decision)
    holds = current_decision(connection, decision.sha256)
    if decision.decision != "note" and decision.expected_version != (holds.id if holds else None):
        change = f"{holds.reviewer or ANONYMOUS} has just {describe_decision(holds)}" if holds else "The review was just undone"
        raise Problem("review_conflict", f"{change}. Check it, then overwrite it if needed.")
    undoes = None
    if decision.decision == "undo":
        if holds is None:
            raise Problem("nothing_to_undo", f"Nothing is decided about {decision.photo}; there is nothing to undo.")
        undoes = holds.id
    made = connection.execute(
        insert(decisions).values(
            sha256=decision.sha256,
            photo=decision.photo,
            label=label,
            decision=decision.decision,
            new_label=decision.new_label if decision.decision == LABEL else None,
            note=decision.note,
            reviewer=decision.reviewer,
            key_name=decision.key_name,
            model_version=decision.model_version,
            undoes=undoes,
            decided_at=datetime.now(timezone.utc),
        )
    )
    if decision.decision != "note":
        _hold(connection, decision.sha256)
    return int(made.inserted_primary_key[0])  # type: ignore[index]


def current_decision(connection: Connection, sha256: str) -> Row[Any] | None:
    """The decision that holds for a photo: the last one that is neither taken back nor a mere note."""
    undone = select(decisions.c.undoes).where(decisions.c.sha256 == sha256, decisions.c.undoes.is_not(None))
    found = select(decisions).where(
        decisions.c.sha256 == sha256, decisions.c.decision.in_(DECISIONS), decisions.c.id.not_in(undone)
    )
    return connection.execute(found.order_by(decisions.c.id.desc()).limit(1)).first()


def latest_entry(connection: Connection, id_: str) -> Row[Any] | None:
    """The decision, note or undo with an id that somebody typed or a link carries, where nothing was decided after it."""
    if not (id_.isascii() and id_.isdigit() and len(id_) < 19):
        return None
    row = get_entry(connection, int(id_))
    if row is None:
        return None
    later = decisions.c.sha256 == row.sha256, decisions.c.id > row.id, decisions.c.decision != "note"
    return None if connection.execute(select(decisions.c.id).where(*later).limit(1)).first() else row


def get_entry(connection: Connection, id_: int) -> Row[Any] | None:
    """The decision, note or undo with that id."""
    return connection.execute(select(decisions).where(decisions.c.id == id_)).first()


def load_history(connection: Connection, sha256: str) -> list[Row[Any]]:
    """Everything that was said about a photo, the newest first."""
    return list(connection.execute(select(decisions).where(decisions.c.sha256 == sha256).order_by(decisions.c.id.desc())))


def describe_decision(decision: Row[Any]) -> str:
    """Describe a decision without its reviewer, such as "relabeled to dogs"."""
    if decision.decision == LABEL:
        verb = "confirmed" if decision.new_label == decision.label else "relabeled to" if decision.label else "labeled"
        return f"{verb} {decision.new_label}"
    return {
        "neither": "marked as none of the classes",
        "bad": "excluded the photo",
        "note": "added a note",
        "undo": "undid",
    }[str(decision.decision)]


def list_reviews(connection: Connection) -> Iterator[Row[Any]]:
    """What holds of every photo that was decided about, in the order of their names: the rows of reviews.csv."""
    columns = [current_reviews.c[name] for name in COLUMNS]
    yield from connection.execute(select(*columns).order_by(current_reviews.c.photo, current_reviews.c.sha256))


def apply_decision(connection: Connection, sha256: str) -> None:
    """Put every prediction of a photo into the cell that the decision about it, or none, gives."""
    review = connection.execute(select(current_reviews).where(current_reviews.c.sha256 == sha256)).first()
    found = connection.execute(
        select(*PREDICTION_COLUMNS, predictions.c.probabilities, models.c.id.label("model_id"), models.c.classes)
        .join(buckets, buckets.c.id == predictions.c.bucket_id)
        .join(models, models.c.id == predictions.c.model_id)
        .where(predictions.c.sha256 == sha256)
    ).all()
    for row in found:
        label, state = resolve_label(review, label=row.label, predicted=row.predicted, classes=row.classes, source=row.source)
        loss = production_loss(row.probabilities, label) if row.source == "production" else row.loss
        BucketWriter(connection, row.model_id).move(row._mapping, label=label, review=state, loss=loss)


def _hold(connection: Connection, sha256: str) -> None:
    """Bring ``current_reviews`` and the cells in line with the decision that holds now."""
    connection.execute(delete(current_reviews).where(current_reviews.c.sha256 == sha256))
    holds = current_decision(connection, sha256)
    if holds is not None:
        row = {name: getattr(holds, name) for name in COLUMNS}
        connection.execute(insert(current_reviews).values(**row, decision_id=holds.id))
    apply_decision(connection, sha256)


def _label_of(connection: Connection, decision: ReviewDecision) -> str | None:
    """The class that the photo was evaluated with, None for a live one.

    Raises Problem where there is no such photo, or the label to give is none of the model's classes.
    """
    texts = decision.model_version, decision.photo, decision.sha256
    found = (
        is_storable(*texts)
        and connection.execute(
            select(buckets.c.label, buckets.c.source, models.c.classes)
            .select_from(predictions)
            .join(buckets, buckets.c.id == predictions.c.bucket_id)
            .join(models, models.c.id == predictions.c.model_id)
            .where(
                models.c.version == decision.model_version,
                predictions.c.photo == decision.photo,
                predictions.c.sha256 == decision.sha256,
            )
        ).first()
    )
    if not found:
        raise Problem("not_found", f"The model {decision.model_version} was not evaluated on a photo {decision.photo!r}.")
    if decision.decision == LABEL and decision.new_label not in found.classes:
        known = ", ".join(found.classes)
        raise Problem("bad_parameter", f"The field `new_label` is {decision.new_label!r}; it can be {known}.")
    return None if found.source == "production" else str(found.classes[found.label])
