"""What stands beside a grid, every part of it a way into another one: facets, confusion matrix, histogram, forms."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from flask import g, request, url_for

from service.context import gallery
from service.db.aggregates import HISTOGRAM_BINS, FacetCounts
from service.db.filter import FACETS, PAGE_SIZES, SORT_ORDERS, UNLABELED, Filter, encode_param, parse_filter, parse_int
from service.db.query import PredictionQuery, PredictionRecord
from service.http.errors import Problem

# Parameter -> its title, and what its values are called; classes and splits have their own names.
FACET_TITLES = {
    "outcome": "Right or wrong",
    "class": "True class",
    "predicted": "Predicted class",
    "review": "Review",
    "flag": "Worth a look",
    "source": "Where from",
    "split": "Split",
}
VALUE_NAMES = {
    "outcome": {"correct": "Right", "incorrect": "Wrong", "unlabeled": "No label"},
    "review": {
        "unreviewed": "Not yet reviewed",
        "confirmed": "Confirmed",
        "relabeled": "Relabelled",
        "neither": "None of the classes",
        "bad": "Bad photo",
    },
    "flag": {"duplicate": "Same photo, another label", "mislabeled": "Probably mislabelled"},
    "source": {"evaluation": "Evaluation", "out-of-fold": "Out of fold", "production": "Live"},
}
CHANGE_NAMES = {"fixed": "Fixed", "broke": "Broke", "both-correct": "Both right", "both-incorrect": "Both wrong"}
FORM_PARAMS = ("sort_by", "min_confidence", "max_confidence")  # what the forms send beside a filter's own parameters
MAX_MATRIX_CELLS = 900  # of a matrix; of more classes the confusions are listed, the most frequent first
MAX_CONFUSIONS = 20
SHADES = 4


@dataclass(frozen=True)
class FacetChoice:
    """A value of a facet, how many photos it would show, and the address that adds it or takes it away."""

    value: str
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
    """The photos of a true class that were called ``predicted``; ``shade`` from 0 to 4 is their share of the row's most."""

    label: str
    predicted: str
    photos: int
    shade: int
    url: str

    @property
    def label_text(self) -> str:
        return f"{self.label}, called {self.predicted}"

    @property
    def kind(self) -> str:
        """How a matrix shows it: what nobody has labelled is no mistake."""
        return "diagonal" if self.label == self.predicted else "unlabeled" if self.label == UNLABELED else "off"


@dataclass(frozen=True)
class ConfusionMatrix:
    """A matrix, its rows in the order of ``columns``, or where it would be too large only its most frequent mistakes."""

    columns: list[str]
    rows: list[tuple[str, list[ConfusionCell]]]
    mistakes: list[ConfusionCell]


@dataclass(frozen=True)
class HistogramBar:
    """Confidences from ``low`` to ``high`` per cent; ``height`` is from 0 to 1."""

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


def page_filter_from_request(**preset: tuple[str, ...]) -> Filter:
    """Parse the filter of a grid page, including the sort order of its form (see ``filter_from_request``)."""
    return apply_sort_params(filter_from_request(extra=("page", *FORM_PARAMS), **preset), request.args)


@contextlib.contextmanager
def open_query(filters: Filter) -> Iterator[PredictionQuery]:
    """Query a filter in one read transaction, which ends with the block."""
    with gallery().database.read() as connection:
        yield PredictionQuery(connection, filters)


def grid_url(filters: Filter, **more: Any) -> str:
    """The grid's address with this filter; page 1 is not said."""
    if more.get("page") == 1:
        del more["page"]
    return f"{_path('gallery.photos')}?{filters.query(**more)}"


def photo_url(filters: Filter, photo: PredictionRecord) -> str:
    """The address of a photo's page, which knows the filter that one came from."""
    return f"{_path('photo.page')}?{filters.query(photo=photo.photo, sha256=photo.sha256)}"


def _path(endpoint: str) -> str:
    """As ``url_for``, once for each request: a matrix of twenty classes has four hundred addresses."""
    paths: dict[str, str] = g.setdefault("paths", {})
    if endpoint not in paths:
        paths[endpoint] = url_for(endpoint)
    return paths[endpoint]


def apply_sort_params(filters: Filter, given: Mapping[str, str]) -> Filter:
    """The filter in the order that a form of the grid sent, as ``sort_by=loss.asc``. Raises Problem."""
    if sort_by := given.get("sort_by"):
        sort, _, order = sort_by.partition(".")
        if sort not in SORT_ORDERS or order not in ("asc", "desc"):
            known = ", ".join(f"{sort}.{order}" for sort in SORT_ORDERS for order in ("asc", "desc"))
            raise Problem("bad_parameter", f"The parameter `sort_by` is {sort_by!r}; it can be {known}.")
        filters = filters.replace(sort=sort, order=order)
    return filters


def apply_range_params(filters: Filter, given: Mapping[str, str]) -> Filter:
    """Apply the range of a grid's form, ``min_confidence=50&max_confidence=90``. Raises Problem."""
    if "min_confidence" not in given and "max_confidence" not in given:
        return filters
    low, high = (
        parse_int(given, "min_confidence", 0, min_value=0, max_value=100),
        parse_int(given, "max_confidence", 100, min_value=0, max_value=100),
    )
    if low >= high:
        raise Problem(
            "bad_parameter", f"The range of confidence is from {low} to {high} %; the first number has to be the lower one."
        )
    return filters.replace(confidence=(low, high))


def hidden_fields(filters: Filter, *without: str) -> list[tuple[str, str]]:
    """The filter as the hidden fields of a form, without the parameters that the form asks for itself."""
    return [(name, value) for name, value in parse_qsl(filters.query(), keep_blank_values=True) if name not in without]


def build_facets(filters: Filter, counts: FacetCounts) -> list[Facet]:
    """Those that have anything to choose."""
    rows = []
    for parameter, title in FACET_TITLES.items():
        chosen: tuple[str, ...] = getattr(filters, FACETS[parameter])
        photos = counts.facets[parameter]
        choices = [
            FacetChoice(
                value, value_label(parameter, value), photos[value], value in chosen, grid_url(filters.toggle(parameter, value))
            )
            for value in sorted({*photos, *chosen}, key=lambda value: (-photos[value], value))
            if value
        ]
        if len(choices) > 1 or chosen or (parameter == "flag" and choices):
            rows.append(Facet(parameter, title, choices))
    return rows


def active_filters(filters: Filter, vs_name: str) -> list[tuple[str, str, str]]:
    """What narrows the grid: title, value, and the address without it."""
    rows = [
        (title, value_label(parameter, value), grid_url(filters.toggle(parameter, value)))
        for parameter, title in FACET_TITLES.items()
        for value in getattr(filters, FACETS[parameter])
    ]
    if filters.confidence != (0, 100):
        low, high = filters.confidence
        rows.append(("Confidence", f"{low}\u2013{high}\u202f%", grid_url(filters.replace(confidence=(0, 100)))))
    if filters.change:
        title = f"Against {vs_name} {filters.baseline}"
        rows.append((title, CHANGE_NAMES[filters.change], grid_url(filters.replace(baseline="", change=""))))
    return rows


def value_label(parameter: str, value: str) -> str:
    """A facet's value in words."""
    return VALUE_NAMES.get(parameter, {}).get(value, value)


def build_confusion_matrix(filters: Filter, found: PredictionQuery) -> ConfusionMatrix:
    """The confusion matrix under the filter."""
    counts = found.counts.confusion
    labels = {label for (label, _), photos in counts.items() if photos}
    answers = {predicted for (_, predicted), photos in counts.items() if photos}
    columns = [name for name in found.model.classes if name in labels or name in answers]
    rows = [name for name in (*columns, UNLABELED) if name in labels]
    highest = {label: max(counts[label, other] for other in columns) for label in rows}

    @functools.cache
    def row_address(label: str) -> str:
        return grid_url(filters.replace(labels=(label,), predicted=()))

    def pair(label: str, predicted: str) -> ConfusionCell:
        photos = counts[label, predicted]
        url = f"{row_address(label)}&{encode_param('predicted', predicted)}" if photos else ""
        return ConfusionCell(label, predicted, photos, -(-SHADES * photos // highest[label]), url)

    if len(rows) * len(columns) <= MAX_MATRIX_CELLS:
        return ConfusionMatrix(columns, [(label, [pair(label, other) for other in columns]) for label in rows], [])
    wrong = [(photos, *key) for key, photos in counts.items() if photos and key[0] not in (key[1], UNLABELED)]
    max_value = sorted(wrong, key=lambda row: (-row[0], *row[1:]))[:MAX_CONFUSIONS]
    return ConfusionMatrix(columns, [], [pair(label, other) for _, label, other in max_value])


def build_histogram(filters: Filter, counts: FacetCounts) -> list[HistogramBar]:
    """Ten bars, which leave room for a thumb: over the upper half of the range where nothing is in the lower."""
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
            (photos / highest) ** 0.5,  # so that the few are seen beside the many
            grid_url(filters.replace(confidence=(max(low, lowest), min(high, top)))) if photos else "",
        )
        for low, high, photos in bins
    ]


def sort_options(filters: Filter) -> list[tuple[str, str, bool]]:
    """What the form's ``sort_by`` can be: value, words, and whether it is what is shown."""
    return [
        (f"{sort}.{order}", label_text[:1].upper() + label_text[1:], (sort, order) == (filters.sort, filters.order))
        for sort, (natural, named) in SORT_ORDERS.items()
        for order, label_text in sorted(named.items(), key=lambda row: row[0] != natural)
        if sort != "random" or order == natural or order == filters.order
    ]


def page_size_options(filters: Filter) -> list[int]:
    """What ``per_page`` can be, the one that an address gave among them."""
    return sorted({*PAGE_SIZES, filters.per_page})


def page_numbers(page: int, pages: int) -> list[int | None]:
    """The pages to offer, None for a gap: the first, the last, and those around this one."""
    near = {1, pages, *range(max(1, page - 2), min(pages, page + 2) + 1)}
    near |= {2} if 3 in near else set()
    near |= {pages - 1} if pages - 2 in near else set()
    found: list[int | None] = []
    for number in sorted(near):
        if found and found[-1] != number - 1:
            found.append(None)
        found.append(number)
    return found
