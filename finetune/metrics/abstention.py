"""What a decision rule does to evaluated images: how many get no label and why, and how often the other labels are correct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.formatting import format_percent
from finetune.metrics.groups import proportion_interval
from models.artifacts.decision_rule import LOW_PROBABILITY, UNLIKE_TRAINING, DecisionRule
from models.artifacts.predictions import Predictions

METHOD = (
    "The decision rule of the model applied to the photos. no_label is the fraction without a label. The accuracy, the "
    "precision and the recall are those of the photos with a label. 95% Wilson score intervals."
)
MAX_SHOWN = 10


def measure_abstention(predictions: Predictions, rule: DecisionRule) -> dict[str, Any] | None:
    """Measure what a rule does to images with labels. Returns None if the rule never abstains.

    Returns:
        The numbers of ``photos``, of those ``unlike_training`` and of those with a ``low_probability``, the fraction with
        ``no_label``, and the ``accuracy`` of the others. Under ``classes`` the same for the images of each class, with their
        ``recall``, and the ``precision`` of the label. Each measure has its 95% interval, or is None without such images.
    """
    if not rule.can_abstain:
        return None
    scores = [None] * len(predictions.labels) if predictions.ood_scores is None else predictions.ood_scores.tolist()
    probabilities = predictions.probabilities.astype(np.float32)  # the type in which they are served
    codes = np.array(
        [
            rule.decide(predictions.classes, row, score).because_code or ""
            for row, score in zip(probabilities, scores, strict=True)
        ]
    )
    labeled, correct, groups = codes == "", predictions.correct, predictions.group_numbers

    def proportion(hits: NDArray[np.bool_], of: NDArray[np.bool_]) -> dict[str, float] | None:
        return proportion_interval(hits[of], None if groups is None else groups[of]) if of.any() else None

    def counts(of: NDArray[np.bool_]) -> dict[str, Any]:
        reasons = {code: int((codes[of] == code).sum()) for code in (UNLIKE_TRAINING, LOW_PROBABILITY)}
        return {"photos": int(of.sum()), **reasons, "no_label": proportion(~labeled, of)}

    everything = np.ones(len(labeled), dtype=bool)
    return {
        **counts(everything),
        "accuracy": proportion(correct, labeled),
        "classes": {
            name: {
                **counts(predictions.labels == index),
                "precision": proportion(correct, labeled & (predictions.predicted == index)),
                "recall": proportion(correct, labeled & (predictions.labels == index)),
            }
            for index, name in enumerate(predictions.classes)
        },
    }


def describe_abstention(measured: Mapping[str, Any]) -> str:
    """Describe in a sentence how many images get no label, and why."""
    unlike, low = measured[UNLIKE_TRAINING], measured[LOW_PROBABILITY]
    return (
        f"{unlike + low:,} of {measured['photos']:,} photos get no label, {format_percent(measured['no_label'], 2)}. "
        f"Unlike the training photos: {unlike:,}. Below the threshold of their most probable class: {low:,}."
    )


def format_abstention(measured: Mapping[str, Any]) -> str:
    """Format the result of ``measure_abstention`` as a short text, with the 10 classes that abstain most."""
    rows: Mapping[str, Mapping[str, Any]] = measured["classes"]
    names = [name for name in rows if rows[name]["photos"] or rows[name]["precision"]]
    if len(names) > MAX_SHOWN:
        names = sorted(names, key=lambda name: -(rows[name]["no_label"] or {"value": 0.0})["value"])[:MAX_SHOWN]
    width = max(5, *map(len, names))
    lines = [
        "With the decision rule of the model:",
        describe_abstention(measured),
        f"accuracy of the rest  {format_percent(measured['accuracy'], 2)}",
        f"{'class':<{width}}  {'precision of the rest':<28}  {'recall of the rest':<28}  no label",
    ]
    for name in names:
        precision, recall, no_label = (format_percent(rows[name][key]) for key in ("precision", "recall", "no_label"))
        lines.append(f"{name:<{width}}  {precision:<28}  {recall:<28}  {no_label}")
    return "\n".join(lines)
