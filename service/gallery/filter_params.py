"""What a request to the gallery is about: its filter, the model that it means, and the listing of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from flask import request

from service.context import gallery
from service.db.filter import Filter, parse_filter
from service.db.query import PredictionQuery
from service.gallery import sidebar

REVIEWER_COOKIE = "reviewer"  # the cookie with the name that somebody gave themselves
AUTO_ADVANCE_COOKIE = "advance"  # the cookie that says whether they go on to the next photo


def filter_from_request(*, extra: Iterable[str] = (), **preset: tuple[str, ...]) -> Filter:
    """The filter of this request's query string, with ``preset`` fields that its address gives. Raises Problem."""
    shown = gallery()
    _ = shown.database  # says so where there is none yet
    return parse_filter(request.args, model=shown.active_version or "", extra=extra).replace(**preset)


def page_filter_from_request(**preset: tuple[str, ...]) -> Filter:
    """Return the filter of a grid page, in the order that its form may have sent (see ``filter_from_request``)."""
    return sidebar.apply_sort_params(filter_from_request(extra=("page", *sidebar.FORM_PARAMS), **preset), request.args)


@contextlib.contextmanager
def open_query(filters: Filter) -> Iterator[PredictionQuery]:
    """The listing of a filter, as long as the block lasts: everything in it is of one moment."""
    with gallery().database.read() as connection:
        yield PredictionQuery(connection, filters)
