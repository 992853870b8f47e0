"""What was decided about a photo, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row


@dataclass(frozen=True)
class Entry:
    """A line of the history. ``words`` continue "Ann ..."; one that was taken back counts no longer."""

    id: int
    who: str
    words: str
    note: str
    decided_at: datetime
    is_undone: bool


def entries(rows: Sequence[Row[Any]]) -> list[Entry]:
    """A photo's decisions, as ``history`` gives them, in words."""
    undone = {row.undoes for row in rows if row.undoes}
    said = {row.id: in_words(row) for row in rows}
    return [
        Entry(
            row.id,
            row.reviewer or "Somebody",
            said[row.id] + (f": {said[row.undoes]}" if row.undoes in said else ""),
            row.note,
            row.decided_at,
            row.id in undone,
        )
        for row in rows
    ]


def in_words(row: Any) -> str:
    """A decision, without who made it: "relabelled it dogs"."""
    if row.decision == "label":
        did = "confirmed" if row.new_label == row.label else "relabelled it" if row.label else "labelled it"
        return f"{did} {row.new_label}"
    return {
        "neither": "found it to be none of the classes",
        "bad": "called it a bad photo",
        "note": "noted",
        "undo": "took back",
    }[row.decision]
