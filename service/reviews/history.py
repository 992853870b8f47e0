"""The reviews of a photo in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from service.reviews.decisions import ANONYMOUS, current_decision, describe_decision, get_entry, latest_entry


@dataclass(frozen=True)
class HistoryEntry:
    """A line of the history: ``text`` follows the reviewer's name, and ``is_undone`` marks a decision without effect."""

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


def saved_message(connection: Connection, id_: str) -> SavedMessage | None:
    """Describe the entry with an id from a link, unless a newer decision replaced it."""
    row = latest_entry(connection, id_)
    if row is None:
        return None
    about = row.photo, row.sha256
    if row.decision == "note":
        return SavedMessage("Note saved", *about, "")
    if row.decision != "undo":
        return SavedMessage("Saved", *about, f"{describe_decision(row)}.", undo=row.id)
    undone, current = get_entry(connection, row.undoes), current_decision(connection, row.sha256)
    assert undone is not None  # entries are never deleted
    if current:
        text = f"previous review restored: {current.reviewer or ANONYMOUS} {describe_decision(current)}."
    else:
        text = f"review removed; label is {row.label}." if row.label else "review removed; no label."
    return SavedMessage("Undone", *about, text, is_undo=True, restored_note=undone.note)


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
