"""Class-activation maps (Zhou et al. 2016, arXiv 1512.04150): where a photo speaks for a class, exact where it can be.

A head that is one linear layer over the mean of the last feature map gives each class a score that is a mean over places:
what a place adds to it is that place's features, weighed by the class's weights. Whether a network is of that kind is not
believed but checked, on each photo, from the graph's own outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from models.artifacts.bundle import HEAD, WEIGHTS, Bundle

Floats = NDArray[np.float32]

# Rounding alone: relative to the largest feature, and of the logarithm of a probability, which does not saturate.
MEAN_TOLERANCE = 1e-3
LOG_TOLERANCE = 1e-2
SMALLEST = 1e-6
SMALLEST_SIDE = 3  # a map of 2 x 2 places is exact as well, and says nothing


@dataclass(frozen=True)
class LinearHead:
    """The last layer as the bundle holds it: ``weight`` (classes, d) and ``bias`` (classes,), and the temperature.

    Probabilities depend on differences of scores alone, so that a score is here one above the mean of all classes' scores.
    """

    weight: Floats
    bias: Floats
    temperature: float

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> LinearHead | None:
        """Read the last layer from a bundle's weights. Returns None if they have no layer of that name."""
        name = bundle.manifest["head"]
        try:
            with safe_open(bundle.path / (HEAD if bundle.lacks_weights else WEIGHTS), framework="numpy") as tensors:
                weight = tensors.get_tensor(f"{name}.weight")
                has_bias = f"{name}.bias" in tensors.keys()  # noqa: SIM118 - it is no mapping
                bias = tensors.get_tensor(f"{name}.bias") if has_bias else np.zeros(len(weight))
        except (OSError, SafetensorError):
            return None
        weight = weight.reshape(len(weight), math.prod(weight.shape[1:])).astype(np.float32)
        return cls(weight - weight.mean(axis=0), (bias - bias.mean()).astype(np.float32), float(bundle.manifest["temperature"]))

    def score_map(self, probabilities: Floats, embedding: Floats, feature_map: Floats, label: int) -> Floats | None:
        """What each place adds to the score of class ``label``: (h, w), whose mean plus the class's bias is the score.

        Takes one photo's probabilities (classes,), embedding (d,) and feature map (c, h, w). None where the network is not of
        the kind for which that is exact.
        """
        if min(feature_map.shape[1:]) < SMALLEST_SIDE or embedding.shape != self.weight.shape[1:]:
            return None
        if not self._gives(probabilities, embedding):
            return None
        for activation in ACTIVATIONS:
            places = activation(feature_map)
            if _is_mean(places, embedding):
                return np.tensordot(self.weight[label], places, axes=1).astype(np.float32)
        return None

    def _gives(self, probabilities: Floats, embedding: Floats) -> bool:
        scores = (self.weight @ embedding + self.bias) / self.temperature
        log_given = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        least = math.log(SMALLEST)
        difference = np.maximum(log_given, least) - np.maximum(np.log(np.maximum(probabilities, SMALLEST)), least)
        return bool(np.abs(difference).max() <= LOG_TOLERANCE)


# What may lie between the map and its mean; DenseNet has a ReLU there.
ACTIVATIONS: tuple[Callable[[Floats], Floats], ...] = (lambda places: places, lambda places: np.maximum(places, 0))


def _is_mean(places: Floats, embedding: Floats) -> bool:
    if len(places) != len(embedding):
        return False
    difference = np.abs(places.mean(axis=(1, 2)) - embedding).max()
    return bool(difference <= MEAN_TOLERANCE * max(float(np.abs(embedding).max()), SMALLEST))
