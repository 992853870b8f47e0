"""service.db.filter: a query string and what it means, there and back; and the sentence that says it."""

from __future__ import annotations

import random
from urllib.parse import parse_qsl

import pytest
from werkzeug.datastructures import MultiDict

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
from service.http.errors import Problem

NAMES = (
    "cats",
    "dogs",
    "a&b",
    "a=b",
    "one, two",
    "Größe",
    "猫 と 犬",
    "100 %",
    "+plus+",
    "#?/",
    "'\"<i>",
    UNLABELED,
    "x" * 300,
)
EVERYTHING = Filter(model="m")


def read(query: str, **options: object) -> Filter:
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
def test_a_filter_comes_back_from_its_query_string(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        wanted = any_filter(rng)
        query = wanted.query()
        assert query.isascii()
        assert read(query) == wanted
        assert read(wanted.query(page=3), extra=("page",)) == wanted


@pytest.mark.parametrize("seed", range(5))
def test_a_query_string_is_the_shortest_one(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        wanted = any_filter(rng)
        parts = wanted.query().split("&")
        for left_out in range(1, len(parts)):  # the first names the model
            shorter = "&".join(part for number, part in enumerate(parts) if number != left_out)
            try:
                other = read(shorter)
            except Problem:
                continue
            assert other != wanted, (shorter, parts[left_out])


def test_nothing_is_said_of_what_is_so_anyway() -> None:
    assert EVERYTHING.query() == "model=m"
    assert read("sort=loss&order=desc&confidence=0-100&per_page=48&seed=0&class=&outcome=&model=").query() == "model=m"
    assert EVERYTHING.query(page=2, after=None) == "model=m&page=2"


def test_what_is_given_twice_counts_once() -> None:
    assert read("class=cats&class=dogs&class=cats").labels == ("cats", "dogs")


def test_a_query_string_as_people_type_it() -> None:
    found = read("class=cats&outcome=incorrect&confidence=90-100&sort=margin&order=desc&per_page=96&baseline=v2&change=broke")
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
    ("query", "wanted"),
    [
        ("klass=cats", "The parameter 'klass' is not known here; there are model, outcome, class, predicted,"),
        ("page=2", "The parameter 'page' is not known here"),
        ("outcome=maybe", "The parameter `outcome` is 'maybe'; it can be correct, incorrect, unlabeled."),
        ("source=moon", "The parameter `source` is 'moon'; it can be evaluation, out-of-fold, production."),
        ("review=done", "The parameter `review` is 'done'; it can be unreviewed, confirmed, relabeled, neither, bad."),
        ("flag=red", "The parameter `flag` is 'red'; it can be duplicate, mislabeled."),
        ("sort=size", "The parameter `sort` is 'size'; it can be loss, confidence, margin, name, random."),
        ("order=up", "The parameter `order` is 'up'; it can be asc, desc."),
        (
            "baseline=v2&change=worse",
            "The parameter `change` is 'worse'; it can be fixed, broke, both-correct, both-incorrect.",
        ),
        ("baseline=v2", "go together"),
        ("change=fixed", "go together"),
        ("seed=-1", "The parameter `seed` is '-1'; a whole number from 0 to 2147483647 was wanted."),
        ("seed=2147483648", "a whole number from 0 to 2147483647"),
        ("seed=1e3", "a whole number from 0 to 2147483647"),
        ("seed=" + "9" * 5000, "a whole number from 0 to 2147483647"),
        ("per_page=23", "a whole number from 24 to 96"),
        ("per_page=97", "a whole number from 24 to 96"),
        ("per_page=%C2%B2%34", "a whole number from 24 to 96"),
        *(
            (f"confidence={text}", "a range in per cent is wanted, as 50-90.")
            for text in ("50", "90-50", "50-50", "50-101", "-5-10", "a-b", "5-", "-5", "5-6-7", "%C2%B2-9", "1-" + "9" * 5000)
        ),
        ("class=a%00b", "The parameter `class` contains a NUL character"),
        ("model=%00", "The parameter `model` contains a NUL character"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(query: str, wanted: str) -> None:
    with pytest.raises(Problem) as caught:
        read(query)
    assert caught.value.code == "bad_parameter"
    assert wanted in caught.value.detail
    assert caught.value.detail.endswith(".")


def test_a_page_has_parameters_of_its_own() -> None:
    assert read("page=2&class=cats", extra=("page",)) == EVERYTHING.replace(labels=("cats",))
    with pytest.raises(Problem, match=r"'pag' .* per_page, page\."):
        read("pag=2", extra=("page",))


def test_page_numbers() -> None:
    assert [parse_page(MultiDict(given)) for given in ({}, {"page": ""}, {"page": "1"}, {"page": "20834"})] == [1, 1, 1, 20834]
    for wrong in ("0", "-1", "1.5", "two", "1000000001", "٣", "9" * 5000):
        with pytest.raises(Problem, match=r"The parameter `page` is .* a whole number from 1 to 1000000000 was wanted"):
            parse_page(MultiDict({"page": wrong}))


@pytest.mark.parametrize("parameter", FACETS)
def test_a_facet_is_toggled_value_by_value(parameter: str) -> None:
    field = FACETS[parameter]
    one = EVERYTHING.toggle(parameter, "a")
    both = one.toggle(parameter, "b")
    assert [getattr(wanted, field) for wanted in (one, both, both.toggle(parameter, "a"))] == [("a",), ("a", "b"), ("b",)]
    assert one.toggle(parameter, "a") == EVERYTHING


def test_cleared_keeps_the_order_and_nothing_else() -> None:
    rng = random.Random(1)
    for _ in range(100):
        wanted = any_filter(rng)
        cleared_filters = wanted.cleared_filters()
        assert cleared_filters == Filter(
            model=wanted.model, sort=wanted.sort, order=wanted.order, seed=wanted.seed, per_page=wanted.per_page
        )
        assert not cleared_filters.is_filtered
        facets = any(getattr(wanted, field) for field in FACETS.values())
        assert wanted.is_filtered == (facets or bool(wanted.change) or wanted.confidence != (0, 100))


def test_another_sort_comes_in_its_own_direction() -> None:
    assert EVERYTHING.order_label == "highest loss first"
    assert EVERYTHING.replace(sort="margin").order_label == "closest call first"
    assert EVERYTHING.replace(sort="name", order="desc").order_label == "by name, backwards"
    assert EVERYTHING.replace(per_page=96).sort == "loss"


@pytest.mark.parametrize(
    ("query", "total", "wanted"),
    [
        ("", 25_000, "25,000 photos that m7 has classified"),
        ("sort=random", 1, "1 photo that m7 has classified, in a random order."),
        ("outcome=incorrect", 0, "0 photos that m7 got wrong"),
        ("outcome=incorrect&class=dogs", 3, "3 photos of class dogs that m7 got wrong"),
        (
            "outcome=incorrect&outcome=unlabeled&sort=name",
            3,
            "3 photos that m7 got wrong or classified without a known label, by name.",
        ),
        ("predicted=cats", 3, "3 photos that m7 has classified as cats"),
        ("predicted=cats&outcome=incorrect", 3, "3 photos that m7 got wrong and called cats"),
        (
            "class=a&class=b&class=c&split=valid&source=evaluation&source=production&sort=confidence",
            9,
            "9 photos of class a, b or c of the split valid from the evaluation or live requests that m7 has classified, "
            "most confident first.",
        ),
        ("class=unlabeled&source=production", 2, "2 photos without a label from live requests that m7 has classified"),
        ("class=cats&class=unlabeled", 2, "2 photos of class cats or without a label that m7 has classified"),
        (
            "outcome=correct&confidence=50-60&sort=margin",
            4,
            "4 photos that m7 got right with a confidence of 50 to 60 %, closest call first.",
        ),
        ("confidence=99-100", 4, "4 photos that m7 has classified with a confidence from 99 % up"),
        ("flag=duplicate", 2, "2 photos that m7 has classified and that look like a photo with another label"),
        ("flag=duplicate", 1, "1 photo that m7 has classified and that looks like a photo with another label"),
        (
            "flag=mislabeled&review=unreviewed&outcome=incorrect",
            12,
            "12 photos that m7 got wrong, that are probably mislabelled and that nobody has reviewed yet",
        ),
        (
            "review=confirmed&review=bad",
            12,
            "12 photos that m7 has classified and that a reviewer has confirmed or a reviewer has called bad",
        ),
        ("review=neither", 1, "1 photo that m7 has classified and that a reviewer has found to be none of the classes"),
        ("baseline=v6&change=fixed", 5, "5 photos that m7 has classified and that m6 has wrong but m7 has right"),
        (
            "baseline=v6&change=broke&class=cats",
            1,
            "1 photo of class cats that m7 has classified and that m6 has right but m7 has wrong",
        ),
        ("baseline=v6&change=both-incorrect&outcome=incorrect", 5, "5 photos that m7 got wrong and that m6 has wrong as well"),
    ],
)
def test_a_filter_in_words(query: str, total: int, wanted: str) -> None:
    """Where the sentence here has no end, the order is the one that is meant where none is given."""
    ending = "" if wanted.endswith(".") else ", highest loss first."
    assert describe_filter(read(query), total, name="m7", vs_name="m6") == wanted + ending
