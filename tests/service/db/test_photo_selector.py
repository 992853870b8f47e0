"""Filters by similarity, by region and by groups of near duplicates, which the gallery resolves outside the database."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest

from service.db.connection import Database
from service.db.filter import COLLAPSE, Filter
from service.db.query import PredictionQuery
from tests.helpers.gallery_rows import CLASSES, VERSION, ExpectedRow, import_table, make_predictions

pytestmark = pytest.mark.slow


class FakeSelector:
    """Selects by the filter's ``similar`` and ``region`` from fixed lists."""

    def __init__(self, parts: list[Collection[str]], groups: Mapping[str, int] | None = None) -> None:
        self.parts = parts
        self.groups = groups or {}

    def select_sha256s(self, filters: Filter) -> list[Collection[str]]:
        return self.parts

    def duplicate_groups(self, version: str) -> Mapping[str, int]:
        return self.groups


@pytest.fixture
def rows(database: Database, tmp_path: Path) -> list[ExpectedRow]:
    return import_table(database, make_predictions(3, 400, CLASSES[2]), tmp_path)


def names(query: PredictionQuery) -> list[str]:
    return [photo.photo for photo in query.fetch(query.ids())]


def test_a_selection_is_counted_paged_and_combined_with_other_filters(database: Database, rows: list[ExpectedRow]) -> None:
    first, second = {row.sha256 for row in rows[:300]}, {row.sha256 for row in rows[100:]}
    filters = Filter(model=VERSION, outcomes=("incorrect",), per_page=24).replace(sort="name")
    with database.read() as connection:
        query = PredictionQuery(connection, filters, selector=FakeSelector([first, second]))
        expected = sorted(row.photo for row in rows[100:300] if row.outcome == "incorrect")
        assert names(query) == expected
        assert query.counts.total == len(expected) > 24
        assert [photo.photo for photo in query.page(2)] == expected[24:48]
        before, previous, following = query.neighbors(query.find(expected[5]))
        assert (before, previous and previous.photo, following and following.photo) == (5, expected[4], expected[6])
        unreviewed = PredictionQuery(connection, filters.replace(reviews=("unreviewed",)), same_model_as=query)
        assert names(unreviewed) == expected  # with the same selector
        assert names(PredictionQuery(connection, filters, selector=FakeSelector([[]]))) == []


@pytest.mark.parametrize("sort", ["name", "loss", "random"])
def test_a_group_of_near_duplicates_is_shown_by_its_first_photo(database: Database, rows: list[ExpectedRow], sort: str) -> None:
    rng = np.random.default_rng(0)
    groups = {row.sha256: int(number) for row, number in zip(rows[:120], rng.integers(0, 40, 120), strict=True)}
    filters = Filter(model=VERSION, outcomes=("correct",), duplicates=COLLAPSE).replace(sort=sort)
    by_name = {row.photo: row for row in rows}
    with database.read() as connection:
        everything = names(PredictionQuery(connection, filters.replace(duplicates="")))
        query = PredictionQuery(connection, filters, selector=FakeSelector([], groups))
        expected, sizes = [], {}
        for name in everything:
            group = groups.get(by_name[name].sha256)
            if group is None:
                expected.append(name)
            elif group in sizes:
                sizes[group] += 1
            else:
                sizes[group] = 1
                expected.append(name)
        assert names(query) == expected
        assert query.counts.total == len(expected)
        shown = {photo.id: groups[photo.sha256] for photo in query.fetch(query.ids()) if photo.sha256 in groups}
        assert query.group_sizes == {id_: sizes[group] for id_, group in shown.items() if sizes[group] > 1}
        assert query.group_sizes


def test_outliers_are_sorted_by_their_score_with_photos_without_one_at_the_end(database: Database, tmp_path: Path) -> None:
    table = make_predictions(4, 50, CLASSES[2])
    scores = np.random.default_rng(1).permutation(50).astype(np.float32)
    scored = type(table)(
        table.classes, table.image_names, table.labels, table.probabilities, table.splits, table.sha256s, ood_scores=scores
    )
    import_table(database, scored, tmp_path)
    others = import_table(database, make_predictions(5, 30, CLASSES[2]), tmp_path, seed=5)
    with database.read() as connection:
        query = PredictionQuery(connection, Filter(model=VERSION).replace(sort="outlier"))
        photos = query.fetch(query.ids())
        found = [photo.ood_score for photo in photos]
        assert found[:50] == sorted(map(float, scores), reverse=True)
        assert found[50:] == [None] * (len(photos) - 50)
        assert len(photos) > 50
        assert others
        for index in (0, 20, 49, 50, len(photos) - 1):
            before, previous, following = query.neighbors(photos[index])
            assert before == index
            assert (previous and previous.id) == (photos[index - 1].id if index else None)
            assert (following and following.id) == (photos[index + 1].id if index + 1 < len(photos) else None)
