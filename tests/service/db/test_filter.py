"""Filters: parsing a query string, writing it, and the text that describes the filter."""

from __future__ import annotations

import random
from urllib.parse import parse_qsl

import pytest
from werkzeug.datastructures import MultiDict

from service.db.errors import InvalidFilterError
from service.db.filter import (
    CHANGES,
    FACETS,
    FLAGS,
    OUTCOMES,
    PAGE_SIZES,
    REVIEWS,
    SORT_ORDERS,
    SOURCES,
    UNLABELED,
    Filter,
    describe_filter,
    parse_filter,
    parse_page,
)

NAMES = (
    "cats",
    "dogs",
    "a&b",
    "a=b",
    "one, two",
    "Größe",
    "猫 と 犬",
    "100%",
    "+plus+",
    "#?/",
    "'\"<i>",
    UNLABELED,
    "x" * 300,
)
EVERYTHING = Filter(model="m")


def parse(query: str, **options: object) -> Filter:
    return parse_filter(MultiDict(parse_qsl(query, keep_blank_values=True)), model="m", **options)  # type: ignore[arg-type]


def some(rng: random.Random, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(rng.sample(values, rng.choice((0, 0, 1, 2)))) if len(values) > 1 else ()


def any_filter(rng: random.Random) -> Filter:
    low = rng.randrange(100)
    sort = rng.choice(list(SORT_ORDERS))
    change = rng.choice(("", "", *CHANGES))
    return Filter(
        model=rng.choice(("m", "1f0e" * 16, *NAMES)),
        outcomes=some(rng, OUTCOMES),
        labels=some(rng, NAMES),
        predicted=some(rng, NAMES),
        sources=some(rng, SOURCES),
        splits=some(rng, NAMES),
        reviews=some(rng, REVIEWS),
        flags=some(rng, FLAGS),
        confidence=rng.choice(((0, 100), (low, rng.randrange(low, 100) + 1))),
        baseline=rng.choice(NAMES) if change else "",
        change=change,
        sort=sort,
        order=rng.choice(("asc", "desc")),
        seed=rng.choice((0, 1, 2**31 - 1)) if sort == "random" else 0,
        per_page=rng.choice((*PAGE_SIZES, 25)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_filter_round_trips_through_its_query_string(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        requested = any_filter(rng)
        query = requested.query()
        assert query.isascii()
        assert parse(query) == requested
        assert parse(requested.query(page=3), extra=("page",)) == requested


@pytest.mark.parametrize("seed", range(5))
def test_a_query_string_is_minimal(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        requested = any_filter(rng)
        parts = requested.query().split("&")
        for left_out in range(1, len(parts)):  # the first names the model
            shorter = "&".join(part for number, part in enumerate(parts) if number != left_out)
            try:
                other = parse(shorter)
            except InvalidFilterError:
                continue
            assert other != requested, (shorter, parts[left_out])


def test_default_values_are_omitted() -> None:
    assert EVERYTHING.query() == "model=m"
    assert parse("sort=loss&order=desc&confidence=0-100&per_page=48&seed=0&class=&outcome=&model=").query() == "model=m"
    assert EVERYTHING.query(page=2, after=None) == "model=m&page=2"


def test_repeated_values_count_once() -> None:
    assert parse("class=cats&class=dogs&class=cats").labels == ("cats", "dogs")


def test_a_query_string_typed_by_hand_is_parsed() -> None:
    found = parse("class=cats&outcome=incorrect&confidence=90-100&sort=margin&order=desc&per_page=96&baseline=v2&change=broke")
    assert found == Filter(
        model="m",
        labels=("cats",),
        outcomes=("incorrect",),
        confidence=(90, 100),
        sort="margin",
        order="desc",
        per_page=96,
        baseline="v2",
        change="broke",
    )


@pytest.mark.parametrize(
    ("query", "requested"),
    [
        ("klass=cats", "Unknown parameter 'klass'. Valid parameters: model, outcome, class, predicted,"),
        ("page=2", "Unknown parameter 'page'."),
        ("outcome=maybe", "Invalid `outcome`: 'maybe'. Valid values: correct, incorrect, unlabeled."),
        ("source=moon", "Invalid `source`: 'moon'. Valid values: evaluation, out-of-fold, production."),
        ("review=done", "Invalid `review`: 'done'. Valid values: unreviewed, confirmed, relabeled, neither, bad."),
        ("flag=red", "Invalid `flag`: 'red'. Valid values: duplicate, mislabeled, unlike."),
        ("sort=size", "Invalid `sort`: 'size'. Valid values: loss, confidence, margin, outlier, newest, name, random."),
        ("order=up", "Invalid `order`: 'up'. Valid values: asc, desc."),
        (
            "baseline=v2&change=worse",
            "Invalid `change`: 'worse'. Valid values: fixed, broke, both-correct, both-incorrect, disagree.",
        ),
        ("baseline=v2", "`baseline` (the version of another model) and `change` require each other."),
        ("change=fixed", "require each other"),
        ("seed=-1", "`seed` must be a whole number from 0 to 2147483647 (got '-1')."),
        ("seed=2147483648", "a whole number from 0 to 2147483647"),
        ("seed=1e3", "a whole number from 0 to 2147483647"),
        ("seed=" + "9" * 5000, "a whole number from 0 to 2147483647"),
        ("per_page=23", "a whole number from 24 to 96"),
        ("per_page=97", "a whole number from 24 to 96"),
        ("per_page=%C2%B2%34", "a whole number from 24 to 96"),
        *(
            (f"confidence={text}", "`confidence` must be a range in percent like 50-90 (got ")
            for text in ("50", "90-50", "50-50", "50-101", "-5-10", "a-b", "5-", "-5", "5-6-7", "%C2%B2-9", "1-" + "9" * 5000)
        ),
        ("class=a%00b", "The parameter `class` contains a NUL character"),
        ("model=%00", "The parameter `model` contains a NUL character"),
    ],
)
def test_an_invalid_parameter_is_rejected_in_one_sentence(query: str, requested: str) -> None:
    with pytest.raises(InvalidFilterError) as caught:
        parse(query)
    assert requested in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_page_has_parameters_of_its_own() -> None:
    assert parse("page=2&class=cats", extra=("page",)) == EVERYTHING.replace(labels=("cats",))
    with pytest.raises(InvalidFilterError, match=r"'pag'\..* per_page, page\."):
        parse("pag=2", extra=("page",))


def test_page_numbers() -> None:
    assert [parse_page(MultiDict(given)) for given in ({}, {"page": ""}, {"page": "1"}, {"page": "20834"})] == [1, 1, 1, 20834]
    for wrong in ("0", "-1", "1.5", "two", "1000000001", "٣", "9" * 5000):
        with pytest.raises(InvalidFilterError, match=r"`page` must be a whole number from 1 to 1000000000 \(got .*\)"):
            parse_page(MultiDict({"page": wrong}))


@pytest.mark.parametrize("parameter", FACETS)
def test_a_facet_is_toggled_value_by_value(parameter: str) -> None:
    field = FACETS[parameter]
    one = EVERYTHING.toggle(parameter, "a")
    both = one.toggle(parameter, "b")
    assert [getattr(requested, field) for requested in (one, both, both.toggle(parameter, "a"))] == [("a",), ("a", "b"), ("b",)]
    assert one.toggle(parameter, "a") == EVERYTHING


def test_clearing_a_filter_keeps_only_the_order() -> None:
    rng = random.Random(1)
    for _ in range(100):
        requested = any_filter(rng)
        cleared_filters = requested.cleared_filters()
        assert cleared_filters == Filter(
            model=requested.model, sort=requested.sort, order=requested.order, seed=requested.seed, per_page=requested.per_page
        )
        assert not cleared_filters.is_filtered
        facets = any(getattr(requested, field) for field in FACETS.values())
        assert requested.is_filtered == (facets or bool(requested.change) or requested.confidence != (0, 100))


def test_a_new_sort_key_uses_its_default_direction() -> None:
    assert EVERYTHING.order_label == "highest loss first"
    assert EVERYTHING.replace(sort="margin").order_label == "closest call first"
    assert EVERYTHING.replace(sort="name", order="desc").order_label == "by name (Z\u2013A)"
    assert EVERYTHING.replace(per_page=96).sort == "loss"


@pytest.mark.parametrize(
    ("query", "total", "expected"),
    [
        ("", 25_000, "m7: 25,000 photos"),
        ("sort=random", 1, "m7: 1 photo, in random order"),
        ("outcome=incorrect", 0, "m7: 0 mistakes"),
        ("outcome=incorrect&class=dogs", 3, "m7: 3 mistakes labeled dogs"),
        ("outcome=correct&sort=newest", 1, "m7: 1 correct prediction, newest first"),
        ("outcome=incorrect&outcome=unlabeled&sort=name", 3, "m7: 3 photos (incorrect or unlabeled), by name"),
        ("predicted=cats", 3, "m7: 3 photos predicted as cats"),
        (
            "class=a&class=b&class=c&split=valid&source=evaluation&source=production&sort=confidence",
            9,
            "m7: 9 photos labeled a, b or c in valid from the evaluation or production, most confident first",
        ),
        ("class=%2Funlabeled&source=production", 2, "m7: 2 photos without a label from production"),
        ("class=cats&class=%2Funlabeled", 2, "m7: 2 photos labeled cats or without a label"),
        ("class=unlabeled", 2, "m7: 2 photos labeled unlabeled"),
        (
            "outcome=correct&confidence=50-60&sort=margin",
            4,
            "m7: 4 correct predictions, confidence 50 to 60%, closest call first",
        ),
        ("confidence=99-100", 4, "m7: 4 photos, confidence 99% or more"),
        ("flag=duplicate", 2, "m7: 2 photos, duplicate with another label"),
        (
            "flag=mislabeled&review=unreviewed&outcome=incorrect",
            12,
            "m7: 12 mistakes, possible label error, not reviewed",
        ),
        ("review=confirmed&review=bad", 12, "m7: 12 photos, confirmed or excluded"),
        ("review=neither", 1, "m7: 1 photo, marked as none of the classes"),
        ("baseline=v6&change=fixed", 5, "m7: 5 photos, fixed since m6"),
        ("baseline=v6&change=broke&class=cats", 1, "m7: 1 photo labeled cats, broken since m6"),
        ("baseline=v6&change=both-incorrect&outcome=incorrect", 5, "m7: 5 mistakes, also incorrect in m6"),
    ],
)
def test_description_of_a_filter(query: str, total: int, expected: str) -> None:
    """The default order is appended if the expected text names none."""
    ending = "" if "sort=" in query else ", highest loss first"
    assert describe_filter(parse(query), total, name="m7", baseline_name="m6") == expected + ending
