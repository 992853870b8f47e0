"""What a request to the gallery is about: its filter, the model that it means, and the listing of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from flask import request

from service.db.filter import Filter, parse_filter
from service.db.query import PredictionQuery
from service.gallery import sidebar
from service.gallery.index import gallery

REVIEWER = "reviewer"  # the cookie with the name that somebody gave themselves
GO_ON = "next"  # the cookie that says whether they go on to the next photo


def asked_filter(*, extra: Iterable[str] = (), **preset: tuple[str, ...]) -> Filter:
    """The filter of this request's query string, with ``preset`` fields that its address gives. Raises Problem."""
    shown = gallery()
    _ = shown.database  # says so where there is none yet
    return parse_filter(request.args, model=shown.version or "", extra=extra).replace(**preset)


def asked_page(**preset: tuple[str, ...]) -> Filter:
    """As ``asked_filter``, of a page of the grid: in the order that its form may have sent, but for ``panel.with_range``."""
    return sidebar.with_sort(asked_filter(extra=("page", *sidebar.FORM), **preset), request.args)


@contextlib.contextmanager
def listing(filters: Filter) -> Iterator[PredictionQuery]:
    """The listing of a filter, as long as the block lasts: everything in it is of one moment."""
    with gallery().database.read() as connection:
        yield PredictionQuery(connection, filters)
