"""What a decision rule does to evaluated images."""

from __future__ import annotations

import dataclasses

import numpy as np

from finetune.metrics.abstention import describe_abstention, format_abstention, measure_abstention
from finetune.metrics.groups import proportion_interval
from models.artifacts.decision_rule import DecisionRule
from models.artifacts.predictions import Predictions
from models.artifacts.statistics import wilson_interval

RULE = DecisionRule(max_ood_score=2.0, min_probability={"dogs": 0.9})
#        right  wrong  right  unlike  right  unsure and wrong  unsure and right  unlike and unsure
LABELS = [0, 0, 0, 0, 1, 0, 1, 1]
OF_DOGS = [0.1, 0.95, 0.4, 0.2, 0.99, 0.8, 0.89, 0.7]
SCORES = [1.0, 1.0, 2.0, 2.1, 1.0, 1.0, 1.0, 9.0]


def predictions(count: int = len(LABELS)) -> Predictions:
    dogs = np.array(OF_DOGS[:count])
    names = tuple(f"valid/{i}.jpg" for i in range(count))
    return Predictions(
        ("cats", "dogs"),
        names,
        np.array(LABELS[:count]),
        np.stack([1 - dogs, dogs], axis=1),
        ("valid",) * count,
        names,
        ood_scores=np.array(SCORES[:count], np.float32),
    )


def test_photos_without_a_label_are_counted_by_reason_and_class() -> None:
    measured = measure_abstention(predictions(), RULE)
    assert measured == {
        "photos": 8,
        "unlike_training": 2,
        "low_probability": 2,
        "no_label": wilson_interval(4, 8),
        "accuracy": wilson_interval(3, 4),
        "classes": {
            "cats": {
                "photos": 5,
                "unlike_training": 1,
                "low_probability": 1,
                "no_label": wilson_interval(2, 5),
                "precision": wilson_interval(2, 2),
                "recall": wilson_interval(2, 3),
            },
            "dogs": {
                "photos": 3,
                "unlike_training": 1,
                "low_probability": 1,
                "no_label": wilson_interval(2, 3),
                "precision": wilson_interval(1, 2),
                "recall": wilson_interval(1, 1),
            },
        },
    }
    assert describe_abstention(measured) == (
        "4 of 8 photos get no label, 50.00% (21.5 to 78.5%). Unlike the training photos: 2. Below the threshold of their most "
        "probable class: 2."
    )
    assert format_abstention(measured).splitlines()[2:] == [
        "accuracy of the rest  75.00% (30.1 to 95.4%)",
        "class  precision of the rest         recall of the rest            no label",
        "cats   100.0% (34.2 to 100.0%)       66.7% (20.8 to 93.9%)         40.0% (11.8 to 76.9%)",
        "dogs   50.0% (9.5 to 90.5%)          100.0% (20.7 to 100.0%)       66.7% (20.8 to 93.9%)",
    ]


def test_a_rule_that_never_abstains_is_not_measured() -> None:
    assert measure_abstention(predictions(), DecisionRule()) is None


def test_without_a_photo_with_a_label_the_rest_is_not_defined() -> None:
    measured = measure_abstention(predictions(4), DecisionRule(max_ood_score=0.5))
    assert measured is not None
    assert measured["accuracy"] is None
    assert measured["classes"]["dogs"]["no_label"] is None
    assert "accuracy of the rest  not defined" in format_abstention(measured)


def test_intervals_allow_for_groups() -> None:
    grouped = dataclasses.replace(predictions(), groups=("a", "a", "b", "b", "c", "c", "d", "d"))
    measured = measure_abstention(grouped, RULE)
    assert measured is not None
    without = np.array([False, False, False, True, False, True, True, True])
    assert measured["no_label"] == proportion_interval(without, grouped.group_numbers)
