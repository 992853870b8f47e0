"""Save one decision about many photos, and undo it as a whole. Photos reviewed in the meantime are skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from models.artifacts.reviews import LABEL, NOTE
from models.errors import list_names
from service.db.errors import InvalidReviewError, NothingToUndoError
from service.db.query import PredictionQuery, ViewVersion, get_model
from service.db.records import ModelRecord
from service.db.schema import UNKNOWN, buckets, current_reviews, decisions, predictions
from service.db.text import is_storable, match_name
from service.reviews.decisions import chunks, current_decisions, update_current_reviews

KEEP, PREDICTED = "keep", "predicted"  # the label of each photo is correct; its prediction is
NEVER = -1  # the id of no decision
BATCH_DECISIONS = (KEEP, PREDICTED, LABEL, "neither", "bad")
REASONS = {  # why a photo of a batch is left as it is
    "reviewed": "{} reviewed by someone else in the meantime",
    "unlabeled": "{} without a label",
    "ambiguous": "{} stored twice with different labels",
    "missing": "{} not among the predictions of the model",
}


@dataclass(frozen=True)
class SelectedPhoto:
    """A photo of a batch. ``expected_version`` is the id of the review that the reviewer saw, None if there was none."""

    photo: str
    sha256: str
    expected_version: int | None = None


@dataclass(frozen=True, kw_only=True)
class BatchDecision:
    """A decision about many photos, one of BATCH_DECISIONS, and who makes it."""

    model_version: str
    decision: str
    new_label: str | None = None
    note: str = ""
    reviewer: str = ""
    key_name: str | None = None


@dataclass(frozen=True)
class LeftPhoto:
    """A photo that a batch left as it is: why (a key of REASONS), and the id of its current review."""

    photo: str
    sha256: str
    reason: str
    version: int | None = None


@dataclass(frozen=True)
class BatchResult:
    """What a batch saved. ``batch`` identifies it for an undo, and is None if nothing was saved."""

    batch: int | None
    saved: int
    left: list[LeftPhoto]

    @property
    def left_counts(self) -> Counter[str]:
        """The number of photos that were left as they are, by reason."""
        return Counter(photo.reason for photo in self.left)


@dataclass(frozen=True)
class BatchSummary:
    """A saved batch in words, its number of photos, and whether something of it can be undone."""

    batch: int
    photos: int
    text: str
    can_undo: bool


def save_batch(connection: Connection, decision: BatchDecision, photos: Sequence[SelectedPhoto]) -> BatchResult:
    """Save a decision about photos of one model, and update all their predictions.

    Photos that someone else has reviewed in the meantime are left as they are, and so is a photo without the label that the
    decision needs.

    Raises:
        RecordNotFoundError: There is no such model.
        InvalidReviewError: The decision or the label is unknown, or a text cannot be stored.
    """
    model = get_model(connection, decision.model_version)
    new_label = _check(decision, model)
    known = _load(connection, model, [photo.sha256 for photo in photos])
    current = current_decisions(connection, sorted({photo.sha256 for photo in photos}))
    left: list[LeftPhoto] = []
    accepted: dict[str, list[tuple[SelectedPhoto, str | None]]] = {}  # by sha256: copies of a photo share their review
    for photo in photos:
        row, version = known.get((photo.photo, photo.sha256)), _id(current.get(photo.sha256))
        label = new_label
        if row is not None and decision.decision in (KEEP, PREDICTED):
            index = row.label if decision.decision == KEEP else row.predicted
            label = None if index == UNKNOWN else model.classes[index]
        reason = (
            "missing" if row is None
            else "reviewed" if version != photo.expected_version
            else "unlabeled" if decision.decision == KEEP and label is None
            else ""
        )  # fmt: skip
        if reason:
            left.append(LeftPhoto(photo.photo, photo.sha256, reason, version))
        else:
            accepted.setdefault(photo.sha256, []).append((photo, label))
    rows, saved = [], 0
    kind = LABEL if decision.decision in (KEEP, PREDICTED) else decision.decision
    for sha256, copies in accepted.items():
        if len({label for _, label in copies}) > 1:
            left += [LeftPhoto(photo.photo, sha256, "ambiguous", photo.expected_version) for photo, _ in copies]
            continue
        photo, label = copies[0]
        row = known[photo.photo, sha256]
        own_label = None if row.source == "production" else model.classes[row.label]
        rows.append({"sha256": sha256, "photo": photo.photo, "label": own_label, "decision": kind, "new_label": label})
        saved += len(copies)
    return BatchResult(_insert(connection, rows, decision), saved, left)


def undo_batch(connection: Connection, batch: int, *, reviewer: str = "", key_name: str | None = None) -> BatchResult:
    """Undo the decisions of a batch. Photos that have another review by now are left as they are.

    Raises:
        NothingToUndoError: There is no such batch, or none of its decisions is current.
    """
    saved = connection.execute(select(decisions).where(decisions.c.batch == batch).order_by(decisions.c.id)).all()
    current = {row[0] for row in connection.execute(_current_of(batch))}
    if not current:
        raise NothingToUndoError("None of these reviews is current any more, so there is nothing to undo.")
    left = [LeftPhoto(row.photo, row.sha256, "reviewed") for row in saved if row.id not in current]
    columns = ("sha256", "photo", "label")
    rows = [
        {name: getattr(row, name) for name in columns} | {"decision": "undo", "new_label": None, "undoes": row.id}
        for row in saved
        if row.id in current
    ]
    undo = BatchDecision(model_version=saved[0].model_version, decision="undo", reviewer=reviewer, key_name=key_name)
    return BatchResult(_insert(connection, rows, undo), len(rows), left)


def select_matching(query: PredictionQuery, view: ViewVersion) -> list[SelectedPhoto]:
    """Select all photos of a filter for a batch, as a reviewer saw them.

    Args:
        query: The filter, on the transaction that saves the batch.
        view: What was stored when the reviewer saw the filter. A photo that was reviewed later gets a version that never
            matches, and a prediction that arrived later is not selected.
    """
    later = select(decisions.c.sha256).where(decisions.c.id > view.decision, decisions.c.decision != NOTE)
    changed = set(query.connection.execute(later).scalars())
    ids = [id_ for id_ in query.ids() if id_ <= view.prediction]
    columns = predictions.c.id, predictions.c.photo, predictions.c.sha256, current_reviews.c.decision_id
    joined = predictions.outerjoin(current_reviews, current_reviews.c.sha256 == predictions.c.sha256)
    photos = {}
    for chunk in chunks(ids):
        for row in query.connection.execute(select(*columns).select_from(joined).where(predictions.c.id.in_(chunk))):
            version = NEVER if row.sha256 in changed else row.decision_id
            photos[row.id] = SelectedPhoto(row.photo, row.sha256, version)
    return [photos[id_] for id_ in ids]


def summarize_batch(connection: Connection, batch: int) -> BatchSummary | None:
    """Describe a batch: "Relabeled 40 photos to cats.". None if there is no such batch."""
    columns = decisions.c.decision, decisions.c.label, decisions.c.new_label
    rows = connection.execute(select(*columns, func.count()).where(decisions.c.batch == batch).group_by(*columns)).all()
    if not rows:
        return None
    count = sum(row[3] for row in rows)
    photos = f"{count:,} photo{'s' * (count > 1)}"
    new_labels = {row.new_label for row in rows}
    if rows[0].decision == "undo":
        text = f"Undone for {photos}."
    elif rows[0].decision != LABEL:
        text = {"neither": f"Marked {photos} as none of the classes.", "bad": f"Excluded {photos}."}[rows[0].decision]
    elif all(row.new_label == row.label for row in rows):
        text = f"Confirmed the label of {photos}."
    elif len(new_labels) == 1:
        text = f"Labeled {photos} {min(new_labels)}."
    else:
        text = f"Labeled {photos} as predicted."
    is_current = connection.execute(_current_of(batch).limit(1)).first() is not None
    return BatchSummary(batch, count, text, is_current)


def describe_left(reasons: Counter[str], total: int) -> str:
    """State how many photos of a batch were left as they are, and why. Empty if there are none."""
    found = [
        REASONS[reason].format(f"{count:,} of {total:,} {'was' if count == 1 else 'were'}")
        for reason, count in sorted(reasons.items())
        if count
    ]
    return f"{', '.join(found)} and left as {'it is' if reasons.total() == 1 else 'they are'}." if found else ""


def _check(decision: BatchDecision, model: ModelRecord) -> str | None:
    """Return the class that a decision names, if any. Raises InvalidReviewError."""
    if decision.decision not in BATCH_DECISIONS:
        known = ", ".join(BATCH_DECISIONS)
        raise InvalidReviewError(f"Invalid `decision`: {decision.decision[:80]!r}. Valid values: {known}.")
    if not is_storable(decision.note, decision.reviewer, decision.new_label or ""):
        raise InvalidReviewError("A text contains a NUL character or an unpaired surrogate. Remove it.")
    if decision.decision != LABEL:
        return None
    new_label = match_name(model.classes, decision.new_label or "")
    if new_label is None:
        raise InvalidReviewError(f"Invalid `new_label`: {decision.new_label!r}. Valid values: {list_names(model.classes)}.")
    return new_label


def _load(connection: Connection, model: ModelRecord, sha256s: Sequence[str]) -> dict[tuple[str, str], Row[Any]]:
    """Load what a decision needs of a model's predictions, by the photo's name and sha256."""
    columns = predictions.c.photo, predictions.c.sha256, buckets.c.label, buckets.c.predicted, buckets.c.source
    found: dict[tuple[str, str], Row[Any]] = {}
    for chunk in chunks(sha256s):
        rows = select(*columns).join(buckets).where(predictions.c.model_id == model.id, predictions.c.sha256.in_(chunk))
        found |= {(row.photo, row.sha256): row for row in connection.execute(rows)}
    return found


def _insert(connection: Connection, rows: Sequence[dict[str, Any]], decision: BatchDecision) -> int | None:
    """Append decisions as one batch and apply them. Returns the number of the batch."""
    if not rows:
        return None
    batch = (connection.execute(select(func.max(decisions.c.id))).scalar() or 0) + 1  # writers run one after the other
    shared = {
        "note": decision.note,
        "reviewer": decision.reviewer,
        "key_name": decision.key_name,
        "model_version": decision.model_version,
        "decided_at": datetime.now(timezone.utc),
        "batch": batch,
    }
    connection.execute(insert(decisions), [shared | row for row in rows])
    update_current_reviews(connection, [row["sha256"] for row in rows])
    return batch


def _current_of(batch: int) -> Any:
    """Select the decisions of a batch that are current."""
    return (
        select(decisions.c.id)
        .join(current_reviews, current_reviews.c.decision_id == decisions.c.id)
        .where(decisions.c.batch == batch)
    )


def _id(row: Row[Any] | None) -> int | None:
    return None if row is None else int(row.id)
