"""What was decided about a photo, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from service.store.reviewing import in_words


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
