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
UNLIKE_TRAINING = "unlike the training images"


@dataclass(frozen=True)
class Decision:
    """The decision for one image.

    Attributes:
        label: The most probable class, or None if the model abstains.
        because: Why there is no label; None if there is one.
        in_distribution: Whether the image is like the training images; None if the model cannot say.
    """

    label: str | None
    because: str | None = None
    in_distribution: bool | None = None


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
        """Decide for one image.

        Args:
            classes: The class names.
            probabilities: Their calibrated probabilities, (C,).
            ood_score: The image's OOD score; None if the model has none.
            abstain: False to give the most probable class in any case.
        """
        in_distribution = self.is_in_distribution(ood_score)
        if abstain and in_distribution is False:
            return Decision(None, UNLIKE_TRAINING, in_distribution)
        best = int(probabilities.argmax())
        label, probability = classes[best], float(probabilities[best])
        required = self.min_probability.get(label, 0.0)
        if abstain and probability < required:
            reason = f"not sure enough of {label}: {_percent(probability)} where {_percent(required)} is required"
            return Decision(None, reason, in_distribution)
        return Decision(label, None, in_distribution)


def _percent(probability: float) -> str:
    """Format a probability with at most one decimal, rounded down, so that 96.99% does not read 97%."""
    return f"{math.floor(probability * 1000 + 1e-9) / 10:g}%"
