"""Read a request's filter, build URLs for it, and build the sidebar: facets, confusion matrix, histogram and form options."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from flask import g, request, url_for

from service.context import gallery
from service.db.aggregates import HISTOGRAM_BINS, FacetCounts, count_buckets
from service.db.filter import (
    COLLAPSE,
    FACETS,
    PAGE_SIZES,
    SORT_ORDERS,
    UNLABELED,
    Filter,
    encode_param,
    parse_filter,
    parse_int,
)
from service.db.query import PredictionQuery
from service.db.records import PredictionRecord
from service.http.errors import Problem

# Titles of the facets and names of their values. Classes and splits are named by themselves.
FACET_TITLES = {
    "outcome": "Outcome",
    "class": "True class",
    "predicted": "Predicted class",
    "review": "Review",
    "flag": "Flags",
    "source": "Source",
    "split": "Split",
}
VALUE_NAMES = {
    "class": {UNLABELED: "No label"},
    "outcome": {"correct": "Correct", "incorrect": "Incorrect", "unlabeled": "No label"},
    "review": {
        "unreviewed": "Not yet reviewed",
        "confirmed": "Confirmed",
        "relabeled": "Relabeled",
        "neither": "None of the classes",
        "bad": "Excluded",
    },
    "flag": {
        "duplicate": "Duplicate with another label",
        "mislabeled": "Possible label error",
        "unlike": "Unlike the training photos",
    },
    "source": {"evaluation": "Evaluation", "out-of-fold": "Out-of-fold", "production": "Production"},
}
CHANGE_NAMES = {
    "fixed": "Fixed",
    "broke": "Broke",
    "both-correct": "Both correct",
    "both-incorrect": "Both incorrect",
    "disagree": "Predicted differently",
}
FORM_PARAMS = ("sort_by", "min_confidence", "max_confidence")  # parameters of the forms, which a redirect replaces
MAX_MATRIX_CELLS = 900  # a larger matrix is replaced by a list of the most frequent confusions
MAX_CONFUSIONS = 20
MAX_UNSORTED_CLASSES = 10  # with more classes those with the most mistakes come first
SHADES = 4


@dataclass(frozen=True)
class FacetChoice:
    """A value of a facet: the number of photos with it, and the URL that adds or removes it."""

    key: str
    name: str
    photos: int
    is_selected: bool
    url: str


@dataclass(frozen=True)
class Facet:
    parameter: str
    title: str
    choices: list[FacetChoice]


@dataclass(frozen=True)
class ConfusionCell:
    """The photos of a class with a predicted class. ``shade``, from 0 to 4, is relative to the largest cell of the row."""

    label: str
    predicted: str
    photos: int
    shade: int
    url: str

    @property
    def label_text(self) -> str:
        if self.label == UNLABELED:
            return f"unlabeled, predicted {self.predicted}"
        return f"{self.label} predicted as {self.predicted}"

    @property
    def kind(self) -> str:
        """The style of the cell. An unlabeled photo is not a mistake."""
        return "diagonal" if self.label == self.predicted else "unlabeled" if self.label == UNLABELED else "off"


@dataclass(frozen=True)
class ConfusionMatrix:
    """A confusion matrix, or only its most frequent mistakes if it would be too large.

    With many classes those with the most mistakes come first.
    """

    columns: list[str]
    rows: list[tuple[str, list[ConfusionCell]]]
    mistakes: list[ConfusionCell]


@dataclass(frozen=True)
class HistogramBar:
    """Confidences from ``low`` to ``high`` percent. ``height`` is from 0 to 1."""

    low: int
    high: int
    photos: int
    height: float
    url: str


def filter_from_request(*, extra: Iterable[str] = (), **preset: tuple[str, ...]) -> Filter:
    """Parse the filter of the current request.

    Args:
        extra: Query parameters of the page that are not part of the filter.
        preset: Fields of the filter that the path implies, such as ``outcomes`` of ``/gallery/correct``.

    Raises:
        Problem: The database is not ready, or a parameter is unknown or invalid.
    """
    index = gallery()
    _ = index.database  # raises while there is none
    return parse_filter(request.args, model=index.active_version or "", extra=extra).replace(**preset)


def page_filter_from_request(*, extra: Iterable[str] = (), **preset: tuple[str, ...]) -> Filter:
    """Parse the filter of a grid page, including the sort order of its form (see ``filter_from_request``)."""
    return apply_sort_params(filter_from_request(extra=("page", *FORM_PARAMS, *extra), **preset), request.args)


@contextlib.contextmanager
def open_query(filters: Filter) -> Iterator[PredictionQuery]:
    """Query a filter in one read transaction, which ends with the block."""
    with gallery().database.read() as connection:
        yield PredictionQuery(connection, filters, selector=gallery())


def grid_url(filters: Filter, **more: Any) -> str:
    """Build the URL of the grid under a filter. Page 1 is omitted."""
    if more.get("page") == 1:
        del more["page"]
    return f"{_path('gallery.photos')}?{filters.query(**more)}"


def photo_url(filters: Filter, photo: PredictionRecord) -> str:
    """Build the URL of a photo's page, which remembers the filter."""
    return f"{_path('photo.page')}?{filters.query(photo=photo.photo, sha256=photo.sha256)}"


def _path(endpoint: str) -> str:
    """Call ``url_for`` once per request: a matrix of 20 classes has 400 URLs."""
    paths: dict[str, str] = g.setdefault("paths", {})
    if endpoint not in paths:
        paths[endpoint] = url_for(endpoint)
    return paths[endpoint]


def apply_sort_params(filters: Filter, given: Mapping[str, str]) -> Filter:
    """Apply the order of the grid's form, such as ``sort_by=loss.asc``. Raises Problem."""
    if sort_by := given.get("sort_by"):
        sort, _, order = sort_by.partition(".")
        if sort not in SORT_ORDERS or order not in ("asc", "desc"):
            known = ", ".join(f"{sort}.{order}" for sort in SORT_ORDERS for order in ("asc", "desc"))
            raise Problem("bad_parameter", f"The parameter `sort_by` is {sort_by!r}; it can be {known}.")
        filters = filters.replace(sort=sort, order=order)
    return filters


def apply_range_params(filters: Filter, given: Mapping[str, str]) -> Filter:
    """Apply the range of the grid's form, such as ``min_confidence=50&max_confidence=90``. Raises Problem."""
    if "min_confidence" not in given and "max_confidence" not in given:
        return filters
    low, high = (
        parse_int(given, "min_confidence", 0, min_value=0, max_value=100),
        parse_int(given, "max_confidence", 100, min_value=0, max_value=100),
    )
    if low >= high:
        raise Problem("bad_parameter", "The minimum must be lower than the maximum.")
    return filters.replace(confidence=(low, high))


def hidden_fields(filters: Filter, *without: str) -> list[tuple[str, str]]:
    """Return the filter as hidden fields of a form, without the form's own parameters."""
    return [(name, value) for name, value in parse_qsl(filters.query(), keep_blank_values=True) if name not in without]


def build_facets(filters: Filter, query: PredictionQuery) -> list[Facet]:
    """Build the facets with a choice. Their values and order do not depend on the filter, so that none of them moves."""
    facets = []
    everything = count_buckets(query.buckets, Filter(model=filters.model)).facets
    orders: dict[str, Sequence[str]] = {"class": (*query.model.classes, UNLABELED), "predicted": query.model.classes}
    for parameter, title in FACET_TITLES.items():
        selected: tuple[str, ...] = getattr(filters, FACETS[parameter])
        photos = query.counts.facets[parameter]
        values = {*everything[parameter], *selected}
        order = orders.get(parameter) or tuple(VALUE_NAMES.get(parameter, sorted(values)))
        choices = [
            FacetChoice(
                f"{parameter} {value}",
                value_label(parameter, value),
                photos[value],
                value in selected,
                grid_url(filters.toggle(parameter, value)),
            )
            for value in order
            if value in values and value
        ]
        if len(choices) > 1 or selected or (parameter == "flag" and choices):
            facets.append(Facet(parameter, title, choices))
    return facets


def build_column_facets(filters: Filter, query: PredictionQuery) -> list[Facet]:
    """Build a facet for each further column of the table of labels."""
    if not query.facet_values:
        return []
    photos = query.count_facet_values()
    choices: dict[str, list[FacetChoice]] = {}
    for value in query.facet_values:
        is_selected = value.key in filters.facets
        url = grid_url(filters.toggle("facet", value.key))
        choice = FacetChoice(f"facet {value.key}", value.value, photos.get(value.id, 0), is_selected, url)
        choices.setdefault(value.column, []).append(choice)
    return [Facet(f"column-{number}", column, own) for number, (column, own) in enumerate(choices.items(), start=1)]


def active_filters(filters: Filter, vs_name: str) -> list[tuple[str, str, str]]:
    """List the active filters: title, value, and the URL without it."""
    rows = [
        (title, value_label(parameter, value), grid_url(filters.toggle(parameter, value)))
        for parameter, title in FACET_TITLES.items()
        for value in getattr(filters, FACETS[parameter])
    ]
    for key in filters.facets:
        column, _, value = key.partition(":")
        rows.append((column, value, grid_url(filters.toggle("facet", key))))
    if filters.confidence != (0, 100):
        low, high = filters.confidence
        rows.append(("Confidence", f"{low}\u2013{high}%", grid_url(filters.replace(confidence=(0, 100)))))
    if filters.change:
        title = f"Compared with {vs_name} {filters.baseline}"
        rows.append((title, CHANGE_NAMES[filters.change], grid_url(filters.replace(baseline="", change=""))))
    if filters.similar:
        rows.append(("Similarity", f"{filters.min_similarity}% or more", grid_url(filters.replace(similar=""))))
    if filters.region:
        rows.append(("Map", "Region", grid_url(filters.replace(region=""))))
    if filters.duplicates:
        value = "As one" if filters.duplicates == COLLAPSE else "One group"
        rows.append(("Near duplicates", value, grid_url(filters.replace(duplicates=""))))
    return rows


def value_label(parameter: str, value: str) -> str:
    """Name a value of a facet."""
    return VALUE_NAMES.get(parameter, {}).get(value, value)


def build_confusion_matrix(filters: Filter, query: PredictionQuery) -> ConfusionMatrix:
    """Build the confusion matrix of the photos under a filter."""
    counts = query.counts.confusion
    labels = {label for (label, _), photos in counts.items() if photos}
    predicted_classes = {predicted for (_, predicted), photos in counts.items() if photos}
    columns = [name for name in query.model.classes if name in labels or name in predicted_classes]
    mistakes = [(photos, *key) for key, photos in counts.items() if photos and key[0] not in (key[1], UNLABELED)]
    if len(columns) > MAX_UNSORTED_CLASSES:
        errors: Counter[str] = Counter()
        for photos, label, predicted in mistakes:
            errors.update({label: photos, predicted: photos})
        columns.sort(key=lambda name: -errors[name])
    rows = [name for name in (*columns, UNLABELED) if name in labels]
    highest = {label: max(counts[label, other] for other in columns) for label in rows}

    @functools.cache
    def row_url(label: str) -> str:
        return grid_url(filters.replace(labels=(label,), predicted=()))

    def cell(label: str, predicted: str) -> ConfusionCell:
        photos = counts[label, predicted]
        url = f"{row_url(label)}&{encode_param('predicted', predicted)}" if photos else ""
        return ConfusionCell(label, predicted, photos, -(-SHADES * photos // highest[label]), url)

    if len(rows) * len(columns) <= MAX_MATRIX_CELLS:
        return ConfusionMatrix(columns, [(label, [cell(label, other) for other in columns]) for label in rows], [])
    most_frequent = sorted(mistakes, key=lambda row: (-row[0], *row[1:]))[:MAX_CONFUSIONS]
    return ConfusionMatrix(columns, [], [cell(label, other) for _, label, other in most_frequent])


def build_histogram(filters: Filter, counts: FacetCounts) -> list[HistogramBar]:
    """Build ten bars, wide enough for a finger. They start at the middle if no confidence is lower."""
    step = 100 // HISTOGRAM_BINS
    half = HISTOGRAM_BINS // 2
    if any(counts.histogram[:half]):
        bins = [(2 * i * step, 2 * (i + 1) * step, sum(counts.histogram[2 * i : 2 * i + 2])) for i in range(half)]
    else:
        bins = [(i * step, (i + 1) * step, counts.histogram[i]) for i in range(half, HISTOGRAM_BINS)]
    highest = max(photos for _, _, photos in bins) or 1
    lowest, top = filters.confidence
    return [
        HistogramBar(
            low,
            high,
            photos,
            (photos / highest) ** 0.5,  # makes small counts visible
            grid_url(filters.replace(confidence=(max(low, lowest), min(high, top)))) if photos else "",
        )
        for low, high, photos in bins
    ]


def sort_options(filters: Filter) -> list[tuple[str, str, bool]]:
    """List the orders of the form: value, text, and whether it is the current one."""
    return [
        (f"{sort}.{order}", label_text[:1].upper() + label_text[1:], (sort, order) == (filters.sort, filters.order))
        for sort, (natural, named) in SORT_ORDERS.items()
        for order, label_text in sorted(named.items(), key=lambda row: row[0] != natural)
        if sort != "random" or order == natural or order == filters.order
    ]


def page_size_options(filters: Filter) -> list[int]:
    """List the page sizes of the form, including the current one."""
    return sorted({*PAGE_SIZES, filters.per_page})


def page_numbers(page: int, pages: int) -> list[int | None]:
    """List the pages to link: the first, the last and the nearest ones, with None for a gap."""
    near = {1, pages, *range(max(1, page - 2), min(pages, page + 2) + 1)}
    near |= {2} if 3 in near else set()
    near |= {pages - 1} if pages - 2 in near else set()
    found: list[int | None] = []
    for number in sorted(near):
        if found and found[-1] != number - 1:
            found.append(None)
        found.append(number)
    return found
