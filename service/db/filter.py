"""The filter of a grid: its query string, and its description in words."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

from werkzeug.datastructures import MultiDict

from service.db.errors import InvalidFilterError
from service.db.text import is_storable

UNLABELED = "/unlabeled"  # the class of a production photo without a label; no class folder has a name with a slash
OUTCOMES = ("correct", "incorrect", "unlabeled")
SOURCES = ("evaluation", "out-of-fold", "production")
REVIEWS = ("unreviewed", "confirmed", "relabeled", "neither", "bad")
FLAGS = ("duplicate", "mislabeled", "unlike")
CHANGES = ("fixed", "broke", "both-correct", "both-incorrect", "disagree")
MAX_CACHED = 200  # characters of a value whose encoded form is cached: clients may send long ones
COLLAPSE = "collapse"  # one card for each group of near duplicates
DEFAULT_SIMILARITY = 50  # percent
DIGEST = re.compile(r"[0-9a-f]{64}")
REGION = re.compile(r"[0-9a-f]{1,64}(:\d{1,4},\d{1,4}){3,128}")
PAGE_SIZES = (24, 48, 72, 96)
SORT_ORDERS = {  # sort -> its default direction, and a label for each direction
    "loss": ("desc", {"desc": "highest loss first", "asc": "lowest loss first"}),
    "confidence": ("desc", {"desc": "most confident first", "asc": "least confident first"}),
    "margin": ("asc", {"asc": "closest call first", "desc": "clearest call first"}),
    "outlier": ("desc", {"desc": "least like the training photos first", "asc": "most like the training photos first"}),
    "newest": ("desc", {"desc": "newest first", "asc": "oldest first"}),
    "name": ("asc", {"asc": "by name", "desc": "by name (Z\u2013A)"}),
    "random": ("asc", {"asc": "in random order", "desc": "in reverse random order"}),
}

# Parameter -> the field of Filter with its values.
FACETS = {
    "outcome": "outcomes",
    "class": "labels",
    "predicted": "predicted",
    "source": "sources",
    "split": "splits",
    "review": "reviews",
    "flag": "flags",
}
PARAMETERS = {**FACETS, "facet": "facets"}  # a value of a further column of the table of labels, as COLUMN:VALUE
OTHER_PARAMETERS = (
    *("confidence", "baseline", "change", "similar", "min_similarity", "duplicates", "region"),
    *("sort", "order", "seed", "per_page"),
)
FACET_VALUES = {"outcome": OUTCOMES, "source": SOURCES, "review": REVIEWS, "flag": FLAGS}


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A selection of one model's predictions and its order. An empty tuple matches everything.

    Values of one facet are alternatives; several facets must all match. ``facets`` are values of further columns, as
    "column:value". ``confidence`` is in whole percent, without the upper end unless it is 100. ``change`` compares with the
    model whose version is ``baseline``.

    ``similar`` is the sha256 of a photo to which the others have a similarity of at least ``min_similarity`` percent.
    ``duplicates`` is COLLAPSE, or the sha256 of a photo to show its near duplicates. ``region`` is a polygon on a map of the
    embeddings, as "MAP:x,y:x,y:x,y". See PhotoSelector.
    """

    model: str
    outcomes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    reviews: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    facets: tuple[str, ...] = ()
    confidence: tuple[int, int] = (0, 100)
    baseline: str = ""
    change: str = ""
    similar: str = ""
    min_similarity: int = DEFAULT_SIMILARITY
    duplicates: str = ""
    region: str = ""
    sort: str = "loss"
    order: str = "desc"
    seed: int = 0
    per_page: int = 48

    def query(self, **more: Any) -> str:
        """Return the shortest query string for this filter. ``more`` are additional parameters like page=2."""
        pairs: list[tuple[str, Any]] = [("model", self.model)]
        for parameter, field in PARAMETERS.items():
            pairs += [(parameter, value) for value in getattr(self, field)]
        if self.confidence != (0, 100):
            pairs.append(("confidence", "{}-{}".format(*self.confidence)))
        if self.change:
            pairs += [("baseline", self.baseline), ("change", self.change)]
        if self.similar:
            pairs += [("similar", self.similar), ("min_similarity", self.min_similarity)]
        pairs += [(name, value) for name in ("duplicates", "region") if (value := getattr(self, name))]
        if self.sort != "loss":
            pairs.append(("sort", self.sort))
        if self.order != SORT_ORDERS[self.sort][0]:
            pairs.append(("order", self.order))
        if self.sort == "random" and self.seed:
            pairs.append(("seed", self.seed))
        if self.per_page != 48:
            pairs.append(("per_page", self.per_page))
        pairs += [(name, value) for name, value in more.items() if value is not None]
        return "&".join([encode_param(name, str(value)) for name, value in pairs])

    def replace(self, **fields: Any) -> Filter:
        """Return the filter with other ``fields``. Changing the sort resets the order to its default direction."""
        if "sort" in fields and "order" not in fields:
            fields["order"] = SORT_ORDERS[fields["sort"]][0]
        return dataclasses.replace(self, **fields)

    def toggle(self, parameter: str, value: str) -> Filter:
        """Return the filter with a facet's value added, or removed if it is selected."""
        field = PARAMETERS[parameter]
        values: tuple[str, ...] = getattr(self, field)
        return self.replace(**{field: tuple(v for v in values if v != value) if value in values else (*values, value)})

    def cleared_filters(self) -> Filter:
        """Return the filter for all photos of the model, in the same order."""
        return Filter(model=self.model, sort=self.sort, order=self.order, seed=self.seed, per_page=self.per_page)

    @property
    def is_filtered(self) -> bool:
        """Whether the filter can exclude photos."""
        return self.cleared_filters() != self

    @property
    def order_label(self) -> str:
        return SORT_ORDERS[self.sort][1][self.order]


def encode_param(parameter: str, value: str) -> str:
    """Encode a query parameter. A page has hundreds of URLs with the same few values, so they are cached."""
    return _encode_cached(parameter, value) if len(value) <= MAX_CACHED else _encode(parameter, value)


def _encode(parameter: str, value: str) -> str:
    return f"{parameter}={quote_plus(value, errors='surrogateescape')}"


_encode_cached = functools.lru_cache(maxsize=4096)(_encode)


def parse_filter(params: MultiDict[str, str], *, model: str, extra: Iterable[str] = ()) -> Filter:
    """Parse the query parameters of a filter.

    Args:
        params: The parameters.
        model: The version of the model if the parameters name none.
        extra: Names of further parameters, which are ignored.

    Raises:
        InvalidFilterError: A parameter is unknown or has an invalid value.
    """
    known = ("model", *PARAMETERS, *OTHER_PARAMETERS)
    for name, value in params.items(multi=True):
        if name not in (*known, *extra):
            raise InvalidFilterError(f"Unknown parameter {name!r}. Valid parameters: {', '.join((*known, *extra))}.")
        if not is_storable(value):
            raise InvalidFilterError(f"The parameter `{name}` contains a NUL character or an unpaired surrogate. Remove it.")
    sort = _parse_choice(params, "sort", tuple(SORT_ORDERS), "loss")
    filters = Filter(
        model=params.get("model") or model,
        **{field: _parse_values(params, parameter) for parameter, field in PARAMETERS.items()},
        confidence=_parse_range(params.get("confidence", "")),
        baseline=params.get("baseline", ""),
        change=_parse_choice(params, "change", CHANGES, ""),
        similar=_parse_pattern(params, "similar", DIGEST, "the SHA-256 of a photo"),
        min_similarity=parse_int(params, "min_similarity", DEFAULT_SIMILARITY, min_value=0, max_value=100),
        duplicates=_parse_duplicates(params),
        region=_parse_pattern(params, "region", REGION, "a polygon MAP:x,y:x,y:x,y of 3 to 128 points"),
        sort=sort,
        order=_parse_choice(params, "order", ("asc", "desc"), SORT_ORDERS[sort][0]),
        seed=parse_int(params, "seed", 0, min_value=0, max_value=2**31 - 1),
        per_page=parse_int(params, "per_page", 48, min_value=PAGE_SIZES[0], max_value=PAGE_SIZES[-1]),
    )
    if not filters.similar:
        filters = filters.replace(min_similarity=DEFAULT_SIMILARITY)
    if bool(filters.baseline) != bool(filters.change):
        raise InvalidFilterError("`baseline` (the version of another model) and `change` require each other. Send both.")
    return filters


def parse_page(params: Mapping[str, str]) -> int:
    """Parse the page number, from 1."""
    return parse_int(params, "page", 1, min_value=1, max_value=10**9)


def parse_int(params: Mapping[str, str], name: str, default: int, *, min_value: int, max_value: int) -> int:
    """Parse a whole number. Raises InvalidFilterError."""
    text = params.get(name) or str(default)
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if not min_value <= value <= max_value:
        raise InvalidFilterError(f"`{name}` must be a whole number from {min_value} to {max_value} (got {text[:40]!r}).")
    return value


def _parse_values(params: MultiDict[str, str], name: str) -> tuple[str, ...]:
    values = tuple(dict.fromkeys(value for value in params.getlist(name) if value))
    for value in values:
        if name in FACET_VALUES and value not in FACET_VALUES[name]:
            raise InvalidFilterError(f"Invalid `{name}`: {value!r}. Valid values: {', '.join(FACET_VALUES[name])}.")
    return values


def _parse_choice(params: Mapping[str, str], name: str, values: tuple[str, ...], default: str) -> str:
    value = params.get(name) or default
    if value != default and value not in values:
        raise InvalidFilterError(f"Invalid `{name}`: {value!r}. Valid values: {', '.join(values)}.")
    return value


def _parse_pattern(params: Mapping[str, str], name: str, pattern: re.Pattern[str], expected: str) -> str:
    value = params.get(name, "")
    if value and not pattern.fullmatch(value):
        raise InvalidFilterError(f"`{name}` must be {expected} (got {value[:40]!r}).")
    return value


def _parse_duplicates(params: Mapping[str, str]) -> str:
    if params.get("duplicates") == COLLAPSE:
        return COLLAPSE
    return _parse_pattern(params, "duplicates", DIGEST, f"{COLLAPSE} or the SHA-256 of a photo")


def _parse_range(text: str) -> tuple[int, int]:
    if not text:
        return (0, 100)
    low, dash, high = text.partition("-")
    numbers = all(end.isascii() and end.isdigit() and len(end) <= 3 for end in (low, high))
    if not (dash and numbers and int(low) < int(high) <= 100):
        raise InvalidFilterError(f"`confidence` must be a range in percent like 50-90 (got {text[:40]!r}).")
    return (int(low), int(high))


def describe_filter(filters: Filter, total: int, *, name: str, baseline_name: str = "") -> str:
    """Describe a filter in words: "dogs-vs-cats: 3 mistakes labeled dogs, highest loss first".

    Args:
        filters: The filter.
        total: The number of matching photos.
        name: The name of the model.
        baseline_name: The name of the model that it is compared with.
    """
    singular, plural = _NOUNS[filters.outcomes[0]] if len(filters.outcomes) == 1 else ("photo", "photos")
    words = f"{total:,} {singular if total == 1 else plural}"
    if len(filters.outcomes) > 1:
        words += f" ({_either(filters.outcomes)})"
    if filters.labels:
        named = [label for label in filters.labels if label != UNLABELED]
        clauses = [f"labeled {_either(named)}"] if named else []
        words += f" {_either([*clauses, 'without a label'] if UNLABELED in filters.labels else clauses)}"
    if filters.predicted:
        words += f" predicted as {_either(filters.predicted)}"
    if filters.splits:
        words += f" in {_either(filters.splits)}"
    if filters.sources:
        words += f" from {_either([_SOURCES[source] for source in filters.sources])}"
    clauses = [f"{name}: {words}", *(facet.replace(":", " = ", 1) for facet in filters.facets)]
    if filters.confidence != (0, 100):
        low, high = filters.confidence
        clauses.append(f"confidence {f'{low}% or more' if high == 100 else f'{low} to {high}%'}")
    if filters.flags:
        clauses.append(_either([_FLAGS[flag] for flag in filters.flags]))
    if filters.similar:
        clauses.append(f"similarity of {filters.min_similarity}% or more")
    if filters.region:
        clauses.append("in a region of the map")
    if filters.duplicates:
        clauses.append("near duplicates as one" if filters.duplicates == COLLAPSE else "near duplicates of one another")
    if filters.change:
        clauses.append(_CHANGES[filters.change].format(baseline=baseline_name or filters.baseline))
    if filters.reviews:
        clauses.append(_either([_REVIEWS[review] for review in filters.reviews]))
    return ", ".join([*clauses, filters.order_label])


_NOUNS = {
    "correct": ("correct prediction", "correct predictions"),
    "incorrect": ("mistake", "mistakes"),
    "unlabeled": ("unlabeled photo", "unlabeled photos"),
}
_SOURCES = {"evaluation": "the evaluation", "out-of-fold": "cross-validation", "production": "production"}
_FLAGS = {
    "duplicate": "duplicate with another label",
    "mislabeled": "possible label error",
    "unlike": "unlike the training photos",
}
_CHANGES = {
    "fixed": "fixed since {baseline}",
    "broke": "broken since {baseline}",
    "both-correct": "also correct in {baseline}",
    "both-incorrect": "also incorrect in {baseline}",
    "disagree": "predicted differently by {baseline}",
}
_REVIEWS = {
    "unreviewed": "not reviewed",
    "confirmed": "confirmed",
    "relabeled": "relabeled",
    "neither": "marked as none of the classes",
    "bad": "excluded",
}


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
