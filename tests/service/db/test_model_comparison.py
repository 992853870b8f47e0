"""Comparison of two models: fixed and broken photos, against plain Python and scipy."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from models.artifacts.predictions import Predictions
from service.db.connection import Database
from service.db.errors import IncompatibleModelsError, RecordNotFoundError
from service.db.filter import CHANGES, Filter
from service.db.model_comparison import ModelComparison, compare_models
from service.db.query import PredictionQuery, get_model
from service.reviews.decisions import ReviewDecision, save_decision
from tests.helpers.gallery_rows import CLASSES, import_table, make_predictions

pytestmark = pytest.mark.slow

NONE = ModelComparison(
    both_correct=0, both_incorrect=0, fixed=0, broke=0, excluded=0, label_conflicts=0, unlabeled=0, only_a=0, only_b=0
)


def change_labels(message: Predictions, which: range) -> Predictions:
    labels = message.labels.copy()
    labels[which] = (labels[which] + 1) % len(message.classes)
    return replace(message, labels=labels)


def test_two_models_on_the_same_photos(database: Database, tmp_path: Path) -> None:
    classes = CLASSES[5]
    one = make_predictions(1, 200, classes)
    two = make_predictions(2, 230, classes)  # other names from here on
    two = replace(one, probabilities=two.probabilities[:200])
    two = change_labels(two, range(20))
    two = replace(two, sha256s=(*two.sha256s[:190], *(sha[::-1] for sha in two.sha256s[190:])))  # replaced photos
    old = {row.sha256: row for row in import_table(database, one, tmp_path, version="v1")}
    new = {row.sha256: row for row in import_table(database, two, tmp_path, version="v2")}
    more = replace(one, classes=(*classes, "another"), probabilities=np.pad(one.probabilities, ((0, 0), (0, 1))))
    import_table(database, more, tmp_path, version="v3")  # the decisions are made about a model that knows a class more
    rng = random.Random(3)
    truth: dict[str, str | None] = {
        sha: row.label if row.label == new[sha].label else "?" for sha, row in old.items() if sha in new
    }
    with database.write() as connection:
        for sha in rng.sample(sorted(truth), 40):
            decision = rng.choice(("label", "neither", "bad"))
            truth[sha] = label = rng.choice(more.classes) if decision == "label" else None
            words = {"photo": old[sha].photo, "sha256": sha, "model_version": "v3", "decision": decision}
            save_decision(connection, ReviewDecision(**words, new_label=label))  # type: ignore[arg-type]
    kinds = {(False, True): "fixed", (True, False): "broke", (True, True): "both-correct", (False, False): "both-incorrect"}
    expected: dict[str, set[str]] = {kind: set() for kind in (*CHANGES, "aside", "label_conflicts")}
    for sha, label in truth.items():
        if label == "?":
            expected["label_conflicts"].add(sha)
        elif label not in classes:
            expected["aside"].add(sha)
        else:
            expected[kinds[old[sha].predicted == label, new[sha].predicted == label]].add(sha)
    expected["disagree"] = {sha for sha in truth if old[sha].predicted != new[sha].predicted}
    assert all(expected.values())
    with database.read() as connection:
        found = compare_models(connection, get_model(connection, "v1"), get_model(connection, "v2"))
        assert found == ModelComparison(
            both_correct=len(expected["both-correct"]),
            both_incorrect=len(expected["both-incorrect"]),
            fixed=len(expected["fixed"]),
            broke=len(expected["broke"]),
            excluded=len(expected["aside"]),
            label_conflicts=len(expected["label_conflicts"]),
            unlabeled=0,
            only_a=10,
            only_b=10,
        )
        assert found.common == sum(len(expected[kind]) for kind in kinds.values())
        for change in CHANGES:
            filters = Filter(model="v2", baseline="v1", change=change, per_page=24)
            listing = PredictionQuery(connection, filters)
            assert listing.counts.total == len(expected[change])
            assert {photo.sha256 for photo in listing.fetch(listing.ids())} == expected[change]
            assert sum(len(listing.page(page)) for page in range(1, listing.page_count + 1)) == len(expected[change])
            narrow = PredictionQuery(connection, filters.replace(labels=classes[:1], sort="random", seed=3))
            shown = narrow.fetch(narrow.ids())
            assert {p.sha256 for p in shown} == {sha for sha in expected[change] if new[sha].label == classes[0]}
            assert narrow.counts.total == len(shown)
            assert narrow.counts.confusion == Counter((photo.label, photo.predicted) for photo in shown)
            assert [narrow.neighbors(photo)[0] for photo in shown[::4]] == list(range(len(shown)))[::4]
        back = compare_models(connection, get_model(connection, "v2"), get_model(connection, "v1"))
        assert (back.fixed, back.broke, back.p_value) == (found.broke, found.fixed, found.p_value)


def test_a_model_against_itself(database: Database, tmp_path: Path) -> None:
    rows = import_table(database, make_predictions(1, 50, CLASSES[2]), tmp_path)
    with database.read() as connection:
        model = get_model(connection, "v1")
        right = sum(row.label == row.predicted for row in rows)
        assert compare_models(connection, model, model) == replace(NONE, both_correct=right, both_incorrect=50 - right)


def test_models_with_other_classes_are_not_compared(database: Database, tmp_path: Path) -> None:
    import_table(database, make_predictions(1, 5, CLASSES[2]), tmp_path)
    import_table(database, make_predictions(1, 5, CLASSES[5]), tmp_path, version="v2")
    with database.read() as connection:
        with pytest.raises(IncompatibleModelsError, match="The models v1 and v2 have different classes"):
            compare_models(connection, get_model(connection, "v1"), get_model(connection, "v2"))
        with pytest.raises(IncompatibleModelsError, match="Compare two models with the same classes"):
            PredictionQuery(connection, Filter(model="v1", baseline="v2", change="fixed"))
        with pytest.raises(RecordNotFoundError, match="no predictions of a model 'v3'"):
            PredictionQuery(connection, Filter(model="v1", baseline="v3", change="fixed"))


@pytest.mark.parametrize(("fixed", "broke"), [(0, 0), (1, 0), (0, 9), (5, 5), (10, 12), (3, 30), (400, 460), (30_000, 30_500)])
def test_mcnemar_is_exact(fixed: int, broke: int) -> None:
    p_value = replace(NONE, fixed=fixed, broke=broke).p_value
    assert p_value == pytest.approx(binomtest(fixed, fixed + broke).pvalue if fixed + broke else 1.0, rel=1e-9)
