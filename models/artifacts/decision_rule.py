"""From an image's probabilities and OOD score to a decision: its label, or no label and the reason.

OOD stands for out of distribution: the score says how unlike the training images an image is. The rule is stored in the
bundle's manifest. This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError

RULE_VERSION = 1
UNLIKE_TRAINING, LOW_PROBABILITY = "unlike_training", "low_probability"  # codes of the reasons
MAX_DIGITS = 8


@dataclass(frozen=True)
class Decision:
    """The decision for one image.

    Attributes:
        label: The most probable class, or None if the model abstains.
        because: Why the rule gives no label, in words; None if it gives one. If the most probable class was requested in any
            case, there is a label and the reason against it.
        in_distribution: Whether the image is like the training images; None if the model cannot say.
        because_code: The same reason for programs: "unlike_training", "low_probability" or None.
    """

    label: str | None
    because: str | None = None
    in_distribution: bool | None = None
    because_code: str | None = None


@dataclass(frozen=True)
class DecisionRule:
    """When a model abstains. The empty rule always gives the most probable class.

    Attributes:
        max_ood_score: The highest OOD score of an image that is like the training images; None without such a limit.
        min_probability: The probability that a class requires, for the classes that require one.
    """

    max_ood_score: float | None = None
    min_probability: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> DecisionRule:
        """Read the rule of a bundle's manifest. Older bundles have none, and their rule is empty.

        Raises:
            BundleError: The rule is malformed or of a newer version.
        """
        stored = manifest.get("decision")
        if stored is None:
            return cls()
        try:
            if stored["version"] > RULE_VERSION:
                raise BundleError(
                    f"The bundle's decision rule has version {stored['version']}, but this version supports rules up to "
                    f"{RULE_VERSION}. Upgrade this program."
                )
            limit = stored["max_ood_score"]
            required = {str(name): float(value) for name, value in stored["min_probability"].items()}
            rule = cls(None if limit is None else float(limit), required)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"The bundle's decision rule cannot be read ({error!r}). Export the bundle again.") from None
        unknown = sorted(required.keys() - set(manifest["classes"]))
        if unknown or (rule.max_ood_score is not None and not math.isfinite(rule.max_ood_score)):
            what = f"it names the class {unknown[0]!r}" if unknown else f"max_ood_score is {rule.max_ood_score}"
            raise BundleError(f"The bundle's decision rule is not valid: {what}. Export the bundle again.")
        return rule

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's field ``decision``."""
        return {
            "version": RULE_VERSION,
            "max_ood_score": self.max_ood_score,
            "min_probability": dict(self.min_probability),
        }

    @property
    def can_abstain(self) -> bool:
        """Whether there are images without a label."""
        return self.max_ood_score is not None or bool(self.min_probability)

    def is_in_distribution(self, ood_score: float | None) -> bool | None:
        """Return whether an image is like the training images, or None without a score or a limit."""
        if ood_score is None or self.max_ood_score is None:
            return None
        return bool(ood_score <= self.max_ood_score)  # false for NaN

    def decide(
        self,
        classes: Sequence[str],
        probabilities: NDArray[np.floating[Any]],
        ood_score: float | None = None,
        *,
        abstain: bool = True,
    ) -> Decision:
        """Decide for one image. If both the OOD score and the probability are a reason, the OOD score is the one that is given.

        Args:
            classes: The class names.
            probabilities: Their calibrated probabilities, (C,).
            ood_score: The image's OOD score; None if the model has none.
            abstain: False to give the most probable class in any case.
        """
        in_distribution = self.is_in_distribution(ood_score)
        best = int(probabilities.argmax())
        name, probability = classes[best], float(probabilities[best])
        required = self.min_probability.get(name, 0.0)
        label = None if abstain else name
        if in_distribution is False:
            return Decision(label, "unlike the training images", in_distribution, UNLIKE_TRAINING)
        if probability < required:
            reason = f"not sure enough of {name}: {_describe_shortfall(probability, required)}"
            return Decision(label, reason, in_distribution, LOW_PROBABILITY)
        return Decision(name, None, in_distribution)


def format_probability(probability: float, digits: int = 2) -> str:
    """Format a probability in percent, rounded down, so that 96.999% does not read 97.00%."""
    return f"{math.floor(probability * 10 ** (digits + 2) + 1e-9) / 10**digits:.{digits}f}%"


def _describe_shortfall(probability: float, required: float) -> str:
    """Format both numbers with as many digits as it takes to see their difference."""
    for digits in range(2, MAX_DIGITS + 1):
        has, needs = format_probability(probability, digits), format_probability(required, digits)
        if has != needs:
            break
    return f"{has} where {needs} is required"
