"""What a grid shows: a query string, the ``Filter`` that it means, and the sentence that says it in words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

from werkzeug.datastructures import MultiDict

from service.http.errors import Problem
from service.http.text_validation import check_items

UNLABELED = "unlabeled"  # stands for the class of a live photo that nobody has labelled
OUTCOMES = ("correct", "incorrect", "unlabeled")
SOURCES = ("evaluation", "out-of-fold", "production")
REVIEWS = ("unreviewed", "confirmed", "relabeled", "neither", "bad")
FLAGS = ("duplicate", "mislabeled")
CHANGES = ("fixed", "broke", "both-correct", "both-incorrect")
MAX_CACHED = 200  # letters of a value whose form in a query is cached: a client may send long ones
PAGE_SIZES = (24, 48, 72, 96)
SORT_ORDERS = {  # a sort's own direction, and its name in each
    "loss": ("desc", {"desc": "highest loss first", "asc": "lowest loss first"}),
    "confidence": ("desc", {"desc": "most confident first", "asc": "least confident first"}),
    "margin": ("asc", {"asc": "closest call first", "desc": "clearest call first"}),
    "name": ("asc", {"asc": "by name", "desc": "by name, backwards"}),
    "random": ("asc", {"asc": "in a random order", "desc": "in a random order, backwards"}),
}

# Parameter -> the field of Filter that takes several values.
FACETS = {
    "outcome": "outcomes",
    "class": "labels",
    "predicted": "predicted",
    "source": "sources",
    "split": "splits",
    "review": "reviews",
    "flag": "flags",
}
_FIXED = {"outcome": OUTCOMES, "source": SOURCES, "review": REVIEWS, "flag": FLAGS}


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which predictions of one model, and in which order. An empty tuple lets everything through.

    Values of one facet are alternatives; facets add up. ``confidence`` is in whole per cent, the upper end excluded but
    for 100. ``change`` is against the model whose version is ``baseline``.
    """

    model: str
    outcomes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    reviews: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    confidence: tuple[int, int] = (0, 100)
    baseline: str = ""
    change: str = ""
    sort: str = "loss"
    order: str = "desc"
    seed: int = 0
    per_page: int = 48

    def query(self, **more: Any) -> str:
        """The query string that means this filter, the shortest one; ``more`` are further parameters, as page=2."""
        pairs: list[tuple[str, Any]] = [("model", self.model)]
        for parameter, field in FACETS.items():
            pairs += [(parameter, value) for value in getattr(self, field)]
        if self.confidence != (0, 100):
            pairs.append(("confidence", "{}-{}".format(*self.confidence)))
        if self.change:
            pairs += [("baseline", self.baseline), ("change", self.change)]
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
        """The same filter with other ``fields``; another sort comes in its own direction."""
        if "sort" in fields and "order" not in fields:
            fields["order"] = SORT_ORDERS[fields["sort"]][0]
        return dataclasses.replace(self, **fields)

    def toggle(self, parameter: str, value: str) -> Filter:
        """With ``value`` of a facet added, or taken away where it is there."""
        field = FACETS[parameter]
        given: tuple[str, ...] = getattr(self, field)
        return self.replace(**{field: tuple(v for v in given if v != value) if value in given else (*given, value)})

    def cleared_filters(self) -> Filter:
        """Everything of the model, in the same order."""
        return Filter(model=self.model, sort=self.sort, order=self.order, seed=self.seed, per_page=self.per_page)

    @property
    def is_filtered(self) -> bool:
        """Whether anything is left out at all."""
        return self.cleared_filters() != self

    @property
    def order_label(self) -> str:
        return SORT_ORDERS[self.sort][1][self.order]


def encode_param(parameter: str, value: str) -> str:
    """A parameter as a query string has it. A page has hundreds of addresses, of the same few values."""
    return _cached_in_query(parameter, value) if len(value) <= MAX_CACHED else _in_query(parameter, value)


def _in_query(parameter: str, value: str) -> str:
    return f"{parameter}={quote_plus(value, errors='surrogateescape')}"


_cached_in_query = functools.lru_cache(maxsize=4096)(_in_query)


def parse_filter(params: MultiDict[str, str], *, model: str, extra: Iterable[str] = ()) -> Filter:
    """The filter that a query string means; ``model`` is meant where it names none, and ``extra`` are parameters of the page.

    Raises Problem for a parameter that is not known here or has a value that it cannot have.
    """
    known = ("model", *FACETS, "confidence", "baseline", "change", "sort", "order", "seed", "per_page")
    for name in params:
        if name not in (*known, *extra):
            raise Problem(
                "bad_parameter", f"The parameter {name!r} is not known here; there are {', '.join((*known, *extra))}."
            )
    check_items("parameter", params.items(multi=True))
    sort = _one_of(params, "sort", tuple(SORT_ORDERS), "loss")
    found = Filter(
        model=params.get("model") or model,
        **{field: _several(params, parameter) for parameter, field in FACETS.items()},
        confidence=_range(params.get("confidence", "")),
        baseline=params.get("baseline", ""),
        change=_one_of(params, "change", CHANGES, ""),
        sort=sort,
        order=_one_of(params, "order", ("asc", "desc"), SORT_ORDERS[sort][0]),
        seed=parse_int(params, "seed", 0, min_value=0, max_value=2**31 - 1),
        per_page=parse_int(params, "per_page", 48, min_value=PAGE_SIZES[0], max_value=PAGE_SIZES[-1]),
    )
    if bool(found.baseline) != bool(found.change):
        raise Problem(
            "bad_parameter", "The parameters `baseline`, another model's version, and `change` go together; one came."
        )
    return found


def parse_page(given: MultiDict[str, str]) -> int:
    """The number of the page, from 1."""
    return parse_int(given, "page", 1, min_value=1, max_value=10**9)


def describe_filter(filters: Filter, total: int, *, name: str, vs_name: str = "") -> str:
    """The filter in words: "3 photos of class dogs that dogs-vs-cats got wrong, highest loss first."."""
    many = total != 1
    parts = [f"{total:,} photo{'s' if many else ''}"]
    if filters.labels:
        parts.append(_labelled(filters.labels))
    if filters.splits:
        parts.append(f"of the split {_either(filters.splits)}")
    if filters.sources:
        parts.append(f"from {_either([_SOURCE[source] for source in filters.sources])}")
    words = _either([_OUTCOME[outcome] for outcome in filters.outcomes]) or "has classified"
    said = f"that {name} {words}"
    if filters.predicted:
        said += f" as {_either(filters.predicted)}" if not filters.outcomes else f" and called {_either(filters.predicted)}"
    if filters.confidence != (0, 100):
        low, high = filters.confidence
        said += f" with a confidence {f'from {low} % up' if high == 100 else f'of {low} to {high} %'}"
    clauses = [said]
    if filters.flags:
        clauses.append(f"that {_either([_FLAG[flag][many] for flag in filters.flags])}")
    if filters.change:
        clauses.append(f"that {_CHANGE[filters.change].format(baseline=vs_name or filters.baseline, name=name)}")
    if filters.reviews:
        clauses.append(f"that {_either([_REVIEW[review] for review in filters.reviews])}")
    *first, last = clauses
    told = f"{', '.join(first)} and {last}" if first else last
    return f"{' '.join(parts)} {told}, {filters.order_label}."


_SOURCE = {"evaluation": "the evaluation", "out-of-fold": "the out-of-fold evaluation", "production": "live requests"}
_OUTCOME = {"correct": "got right", "incorrect": "got wrong", "unlabeled": "classified without a known label"}
_FLAG = {  # of one photo, of several
    "duplicate": ("looks like a photo with another label", "look like a photo with another label"),
    "mislabeled": ("is probably mislabelled", "are probably mislabelled"),
}
_CHANGE = {
    "fixed": "{baseline} has wrong but {name} has right",
    "broke": "{baseline} has right but {name} has wrong",
    "both-correct": "{baseline} has right as well",
    "both-incorrect": "{baseline} has wrong as well",
}
_REVIEW = {
    "unreviewed": "nobody has reviewed yet",
    "confirmed": "a reviewer has confirmed",
    "relabeled": "a reviewer has relabeled",
    "neither": "a reviewer has found to be none of the classes",
    "bad": "a reviewer has called bad",
}


def _labelled(labels: Sequence[str]) -> str:
    named = [label for label in labels if label != UNLABELED]
    words = [f"of class {_either(named)}"] if named else []
    return _either([*words, *(["without a label"] if len(named) < len(labels) else [])])


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else ""


def _several(given: MultiDict[str, str], name: str) -> tuple[str, ...]:
    values = tuple(dict.fromkeys(value for value in given.getlist(name) if value))
    for value in values:
        if name in _FIXED and value not in _FIXED[name]:
            raise Problem("bad_parameter", f"The parameter `{name}` is {value!r}; it can be {', '.join(_FIXED[name])}.")
    return values


def _one_of(given: MultiDict[str, str], name: str, values: tuple[str, ...], default: str) -> str:
    value = given.get(name) or default
    if value != default and value not in values:
        raise Problem("bad_parameter", f"The parameter `{name}` is {value!r}; it can be {', '.join(values)}.")
    return value


def parse_int(given: Mapping[str, str], name: str, default: int, *, min_value: int, max_value: int) -> int:
    """A parameter that is a number, as it came or its default. Raises Problem."""
    text = given.get(name) or str(default)
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if not min_value <= value <= max_value:
        raise Problem(
            "bad_parameter", f"The parameter `{name}` is {text!r}; a whole number from {min_value} to {max_value} was wanted."
        )
    return value


def _range(text: str) -> tuple[int, int]:
    if not text:
        return (0, 100)
    low, dash, high = text.partition("-")
    numbers = all(end.isascii() and end.isdigit() and len(end) <= 3 for end in (low, high))
    if not (dash and numbers and int(low) < int(high) <= 100):
        raise Problem("bad_parameter", f"The parameter `confidence` is {text!r}; a range in per cent is wanted, as 50-90.")
    return (int(low), int(high))
