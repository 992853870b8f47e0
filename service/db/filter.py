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

UNLABELLED = "not labelled"  # stands for the class of a live photo that nobody has labelled
VERDICTS = ("right", "wrong", "unknown")
SOURCES = ("evaluation", "out-of-fold", "live")
REVIEWS = ("unreviewed", "confirmed", "relabelled", "neither", "bad")
FLAGS = ("duplicate", "mislabelled")
CHANGES = ("fixed", "broke", "both-right", "both-wrong")
PER_PAGE = (24, 48, 72, 96)
ORDERS = {  # a sort's own direction, and its name in each
    "loss": ("desc", {"desc": "highest loss first", "asc": "lowest loss first"}),
    "confidence": ("desc", {"desc": "most confident first", "asc": "least confident first"}),
    "margin": ("asc", {"asc": "closest call first", "desc": "clearest call first"}),
    "name": ("asc", {"asc": "by name", "desc": "by name, backwards"}),
    "random": ("asc", {"asc": "in a random order", "desc": "in a random order, backwards"}),
}

# Parameter -> the field of Filter that takes several values.
FACETS = {
    "verdict": "verdicts",
    "class": "labels",
    "predicted": "predicted",
    "source": "sources",
    "split": "splits",
    "review": "reviews",
    "flag": "flags",
}
_FIXED = {"verdict": VERDICTS, "source": SOURCES, "review": REVIEWS, "flag": FLAGS}


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which predictions of one model, and in which order. An empty tuple lets everything through.

    Values of one facet are alternatives; facets add up. ``confidence`` is in whole per cent, the upper end excluded but
    for 100. ``change`` is against the model whose version is ``vs``.
    """

    model: str
    verdicts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    reviews: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    confidence: tuple[int, int] = (0, 100)
    vs: str = ""
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
            pairs += [("vs", self.vs), ("change", self.change)]
        if self.sort != "loss":
            pairs.append(("sort", self.sort))
        if self.order != ORDERS[self.sort][0]:
            pairs.append(("order", self.order))
        if self.sort == "random" and self.seed:
            pairs.append(("seed", self.seed))
        if self.per_page != 48:
            pairs.append(("per_page", self.per_page))
        pairs += [(name, value) for name, value in more.items() if value is not None]
        return "&".join([in_query(name, str(value)) for name, value in pairs])

    def having(self, **fields: Any) -> Filter:
        """The same filter with other ``fields``; another sort comes in its own direction."""
        if "sort" in fields and "order" not in fields:
            fields["order"] = ORDERS[fields["sort"]][0]
        return dataclasses.replace(self, **fields)

    def toggled(self, parameter: str, value: str) -> Filter:
        """With ``value`` of a facet added, or taken away where it is there."""
        field = FACETS[parameter]
        given: tuple[str, ...] = getattr(self, field)
        return self.having(**{field: tuple(v for v in given if v != value) if value in given else (*given, value)})

    def cleared(self) -> Filter:
        """Everything of the model, in the same order."""
        return Filter(model=self.model, sort=self.sort, order=self.order, seed=self.seed, per_page=self.per_page)

    @property
    def is_narrow(self) -> bool:
        """Whether anything is left out at all."""
        return self.cleared() != self

    @property
    def order_in_words(self) -> str:
        return ORDERS[self.sort][1][self.order]


@functools.lru_cache(maxsize=4096)
def in_query(parameter: str, value: str) -> str:
    """A parameter as a query string has it. A page has hundreds of addresses, of the same few values."""
    return f"{parameter}={quote_plus(value, errors='surrogateescape')}"


def read_filter(given: MultiDict[str, str], *, model: str, also: Iterable[str] = ()) -> Filter:
    """The filter that a query string means; ``model`` is meant where it names none, and ``also`` are parameters of the page.

    Raises Problem for a parameter that is not known here or has a value that it cannot have.
    """
    known = ("model", *FACETS, "confidence", "vs", "change", "sort", "order", "seed", "per_page")
    for name in given:
        if name not in (*known, *also):
            raise Problem("bad_parameter", f"The parameter {name!r} is not known here; there are {', '.join((*known, *also))}.")
        if any("\0" in value for value in given.getlist(name)):
            raise Problem("bad_parameter", f"The parameter `{name}` has a zero byte in it, which no name has.")
    sort = _one_of(given, "sort", tuple(ORDERS), "loss")
    found = Filter(
        model=given.get("model") or model,
        **{field: _several(given, parameter) for parameter, field in FACETS.items()},
        confidence=_range(given.get("confidence", "")),
        vs=given.get("vs", ""),
        change=_one_of(given, "change", CHANGES, ""),
        sort=sort,
        order=_one_of(given, "order", ("asc", "desc"), ORDERS[sort][0]),
        seed=whole(given, "seed", 0, least=0, most=2**31 - 1),
        per_page=whole(given, "per_page", 48, least=PER_PAGE[0], most=PER_PAGE[-1]),
    )
    if bool(found.vs) != bool(found.change):
        raise Problem("bad_parameter", "The parameters `vs`, another model's version, and `change` go together; one came.")
    return found


def read_page(given: MultiDict[str, str]) -> int:
    """The number of the page, from 1."""
    return whole(given, "page", 1, least=1, most=10**9)


def sentence(wanted: Filter, total: int, *, name: str, vs_name: str = "") -> str:
    """The filter in words: "3 photos of class dogs that dogs-vs-cats got wrong, highest loss first."."""
    many = total != 1
    parts = [f"{total:,} photo{'s' if many else ''}"]
    if wanted.labels:
        parts.append(_labelled(wanted.labels))
    if wanted.splits:
        parts.append(f"of the split {_either(wanted.splits)}")
    if wanted.sources:
        parts.append(f"from {_either([_SOURCE[source] for source in wanted.sources])}")
    verdict = _either([_VERDICT[verdict] for verdict in wanted.verdicts]) or "has classified"
    said = f"that {name} {verdict}"
    if wanted.predicted:
        said += f" as {_either(wanted.predicted)}" if not wanted.verdicts else f" and called {_either(wanted.predicted)}"
    if wanted.confidence != (0, 100):
        low, high = wanted.confidence
        said += f" with a confidence {f'from {low} % up' if high == 100 else f'of {low} to {high} %'}"
    clauses = [said]
    if wanted.flags:
        clauses.append(f"that {_either([_FLAG[flag][many] for flag in wanted.flags])}")
    if wanted.change:
        clauses.append(f"that {_CHANGE[wanted.change].format(vs=vs_name or wanted.vs, name=name)}")
    if wanted.reviews:
        clauses.append(f"that {_either([_REVIEW[review] for review in wanted.reviews])}")
    *first, last = clauses
    told = f"{', '.join(first)} and {last}" if first else last
    return f"{' '.join(parts)} {told}, {wanted.order_in_words}."


_SOURCE = {"evaluation": "the evaluation", "out-of-fold": "the out-of-fold evaluation", "live": "live requests"}
_VERDICT = {"right": "got right", "wrong": "got wrong", "unknown": "classified without a known label"}
_FLAG = {  # of one photo, of several
    "duplicate": ("looks like a photo with another label", "look like a photo with another label"),
    "mislabelled": ("is probably mislabelled", "are probably mislabelled"),
}
_CHANGE = {
    "fixed": "{vs} has wrong but {name} has right",
    "broke": "{vs} has right but {name} has wrong",
    "both-right": "{vs} has right as well",
    "both-wrong": "{vs} has wrong as well",
}
_REVIEW = {
    "unreviewed": "nobody has reviewed yet",
    "confirmed": "a reviewer has confirmed",
    "relabelled": "a reviewer has relabelled",
    "neither": "a reviewer has found to be none of the classes",
    "bad": "a reviewer has called bad",
}


def _labelled(labels: Sequence[str]) -> str:
    named = [label for label in labels if label != UNLABELLED]
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


def whole(given: Mapping[str, str], name: str, default: int, *, least: int, most: int) -> int:
    """A parameter that is a number, as it came or its default. Raises Problem."""
    text = given.get(name) or str(default)
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if not least <= value <= most:
        raise Problem("bad_parameter", f"The parameter `{name}` is {text!r}; a whole number from {least} to {most} was wanted.")
    return value


def _range(text: str) -> tuple[int, int]:
    if not text:
        return (0, 100)
    low, dash, high = text.partition("-")
    numbers = all(end.isascii() and end.isdigit() and len(end) <= 3 for end in (low, high))
    if not (dash and numbers and int(low) < int(high) <= 100):
        raise Problem("bad_parameter", f"The parameter `confidence` is {text!r}; a range in per cent is wanted, as 50-90.")
    return (int(low), int(high))
