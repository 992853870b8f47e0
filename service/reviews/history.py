"""What was decided about a photo, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from service.reviews.decisions import current_decision, describe_decision, get_entry, latest_entry

ANONYMOUS = "Somebody"


@dataclass(frozen=True)
class HistoryEntry:
    """A line of the history. ``text`` continue "Ann ..."; one that was taken back counts no longer."""

    id: int
    reviewer: str
    text: str
    note: str
    decided_at: datetime
    is_undone: bool


@dataclass(frozen=True)
class SavedMessage:
    """What was just saved: what it is called, the photo that it is about, and the rest of the sentence, or of two.

    ``undo`` is the id of the decision where it can be undone.
    """

    title: str
    photo: str
    sha256: str
    text: str
    undo: int | None = None


def saved_message(connection: Connection, id_: str) -> SavedMessage | None:
    """The entry with an id that a link carries; of an undo, what it took back and what holds now."""
    row = latest_entry(connection, id_)
    if row is None:
        return None
    about = row.photo, row.sha256
    if row.decision == "note":
        return SavedMessage("Noted", *about, "nothing else has changed.")
    if row.decision != "undo":
        return SavedMessage("Saved", *about, f"{_said(row)}.", undo=row.id)
    undone, holds = get_entry(connection, row.undoes), current_decision(connection, row.sha256)
    assert undone is not None  # entries are never deleted
    if holds:
        now = f"What was decided before holds again: {_said(holds)}."
    else:
        now = f"Nothing is decided about it now, and its label is {row.label}." if row.label else "It has no label now."
    return SavedMessage("Undone", *about, f"{_said(undone)}. {now}")


def _said(row: Row[Any]) -> str:
    return f"{row.reviewer or ANONYMOUS} {describe_decision(row)}"


def history_entries(rows: Sequence[Row[Any]]) -> list[HistoryEntry]:
    """A photo's decisions, as ``history`` gives them, in words."""
    undone = {row.undoes for row in rows if row.undoes}
    said = {row.id: describe_decision(row) for row in rows}
    return [
        HistoryEntry(
            row.id,
            row.reviewer or ANONYMOUS,
            said[row.id] + (f": {said[row.undoes]}" if row.undoes in said else ""),
            row.note,
            row.decided_at,
            row.id in undone,
        )
        for row in rows
    ]
