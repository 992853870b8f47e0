from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from models.artifacts.decision_rule import LOW_PROBABILITY, UNLIKE_TRAINING, Decision, DecisionRule, format_probability
from models.errors import BundleError

CLASSES = ("cats", "dogs")
SURE, UNSURE = np.array([0.02, 0.98], np.float32), np.array([0.0301, 0.9699], np.float32)
UNLIKE = Decision(None, "unlike the training images", False, UNLIKE_TRAINING)


def manifest(**decision: Any) -> dict[str, Any]:
    fields = {"version": 1, "max_ood_score": 2.5, "min_probability": {"dogs": 0.97}}
    return {"classes": list(CLASSES), "decision": {**fields, **decision}}


def test_the_empty_rule_gives_the_most_probable_class() -> None:
    assert DecisionRule().decide(CLASSES, UNSURE) == Decision("dogs")
    assert DecisionRule().decide(CLASSES, UNSURE, ood_score=1e9) == Decision("dogs")


def test_an_image_up_to_the_limit_is_in_distribution() -> None:
    rule = DecisionRule(max_ood_score=2.5)
    assert rule.decide(CLASSES, SURE, ood_score=2.5) == Decision("dogs", None, True)
    assert rule.decide(CLASSES, SURE, ood_score=2.5001) == UNLIKE


def test_a_score_that_is_not_a_number_is_not_in_distribution() -> None:
    assert DecisionRule(max_ood_score=2.5).decide(CLASSES, SURE, ood_score=math.nan) == UNLIKE


def test_without_a_score_the_model_cannot_say() -> None:
    assert DecisionRule(max_ood_score=2.5).decide(CLASSES, SURE, ood_score=None) == Decision("dogs", None, None)


def test_a_class_can_require_a_probability() -> None:
    rule = DecisionRule(min_probability={"dogs": 0.97})
    assert rule.decide(CLASSES, SURE) == Decision("dogs")
    assert rule.decide(CLASSES, UNSURE) == Decision(
        None, "not sure enough of dogs: 96.99% where 97.00% is required", None, LOW_PROBABILITY
    )
    assert rule.decide(CLASSES, np.array([0.6, 0.4])) == Decision("cats")


def test_the_ood_score_takes_precedence() -> None:
    rule = DecisionRule(max_ood_score=2.5, min_probability={"dogs": 0.97})
    assert rule.decide(CLASSES, UNSURE, ood_score=3.0) == UNLIKE
    assert rule.decide(CLASSES, UNSURE, ood_score=1.0).in_distribution is True


def test_the_most_probable_class_can_be_requested_in_any_case() -> None:
    """The label then has the reason against it."""
    rule = DecisionRule(max_ood_score=2.5, min_probability={"dogs": 0.97})
    unlike, unsure, sure = (
        rule.decide(CLASSES, probabilities, ood_score=score, abstain=False)
        for probabilities, score in ((UNSURE, 3.0), (UNSURE, 1.0), (SURE, 1.0))
    )
    assert unlike == dataclasses.replace(UNLIKE, label="dogs")
    assert unsure == dataclasses.replace(rule.decide(CLASSES, UNSURE, ood_score=1.0), label="dogs")
    assert unsure.because_code == LOW_PROBABILITY
    assert sure == Decision("dogs", None, True)


def test_probabilities_are_rounded_down() -> None:
    assert [format_probability(p) for p in (0.915678, 0.96999999, 0.57, 1.0)] == ["91.56%", "96.99%", "57.00%", "100.00%"]


def test_a_probability_never_reads_like_the_one_that_is_required() -> None:
    rule = DecisionRule(min_probability={"dogs": 0.999986})
    decision = rule.decide(CLASSES, np.array([0.00002, 0.99998]))
    assert decision.because == "not sure enough of dogs: 99.9980% where 99.9986% is required"


def test_the_manifest_stores_the_rule() -> None:
    rule = DecisionRule(max_ood_score=2.5, min_probability={"dogs": 0.97})
    assert DecisionRule.from_manifest({"classes": CLASSES, "decision": rule.as_dict()}) == rule
    assert rule.as_dict() == manifest()["decision"]


def test_an_older_manifest_has_the_empty_rule() -> None:
    assert DecisionRule.from_manifest({"classes": CLASSES}) == DecisionRule()


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (
            {"version": 2},
            "The bundle's decision rule has version 2, but this version supports rules up to 1. Upgrade this program.",
        ),
        (
            {"max_ood_score": "far"},
            "The bundle's decision rule cannot be read (ValueError(\"could not convert string to float: 'far'\")). "
            "Export the bundle again.",
        ),
        (
            {"min_probability": {"wolves": 0.9}},
            "The bundle's decision rule is not valid: it names the class 'wolves'. Export the bundle again.",
        ),
        (
            {"max_ood_score": math.inf},
            "The bundle's decision rule is not valid: max_ood_score is inf. Export the bundle again.",
        ),
        (
            {"min_probability": [0.9]},
            "The bundle's decision rule cannot be read (AttributeError(\"'list' object has no attribute 'items'\")). "
            "Export the bundle again.",
        ),
    ],
)
def test_a_malformed_rule_is_rejected(decision: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as caught:
        DecisionRule.from_manifest(manifest(**decision))
    assert str(caught.value) == message
