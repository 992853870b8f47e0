"""What was decided about a photo, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from service.reviews.decisions import entry, holding, in_words, last_said

SOMEBODY = "Somebody"


@dataclass(frozen=True)
class Entry:
    """A line of the history. ``words`` continue "Ann ..."; one that was taken back counts no longer."""

    id: int
    who: str
    words: str
    note: str
    decided_at: datetime
    is_undone: bool


@dataclass(frozen=True)
class Saved:
    """What was just saved: what it is called, the photo that it is about, and the rest of the sentence, or of two.

    ``undo`` is the id of the decision where it can be undone.
    """

    done: str
    photo: str
    sha256: str
    words: str
    undo: int | None = None


def saved(connection: Connection, id_: str) -> Saved | None:
    """The entry with an id that a link carries; of an undo, what it took back and what holds now."""
    row = last_said(connection, id_)
    if row is None:
        return None
    about = row.photo, row.sha256
    if row.decision == "note":
        return Saved("Noted", *about, "nothing else has changed.")
    if row.decision != "undo":
        return Saved("Saved", *about, f"{_said(row)}.", undo=row.id)
    undone, holds = entry(connection, row.undoes), holding(connection, row.sha256)
    assert undone is not None  # entries are never deleted
    if holds:
        now = f"What was decided before holds again: {_said(holds)}."
    else:
        now = f"Nothing is decided about it now, and its label is {row.label}." if row.label else "It has no label now."
    return Saved("Undone", *about, f"{_said(undone)}. {now}")


def _said(row: Row[Any]) -> str:
    return f"{row.reviewer or SOMEBODY} {in_words(row)}"


def entries(rows: Sequence[Row[Any]]) -> list[Entry]:
    """A photo's decisions, as ``history`` gives them, in words."""
    undone = {row.undoes for row in rows if row.undoes}
    said = {row.id: in_words(row) for row in rows}
    return [
        Entry(
            row.id,
            row.reviewer or SOMEBODY,
            said[row.id] + (f": {said[row.undoes]}" if row.undoes in said else ""),
            row.note,
            row.decided_at,
            row.id in undone,
        )
        for row in rows
    ]
