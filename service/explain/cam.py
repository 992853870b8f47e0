"""Class-activation maps (Zhou et al. 2016, https://arxiv.org/abs/1512.04150), which are exact for networks with a linear head.

If the head is one linear layer over the spatial mean of the last feature map, the score of a class is a mean over positions:
the contribution of a position is the product of its features and the class's weights. Whether a network has this structure is
verified for each image from the outputs of the graph.
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

# Tolerances for rounding errors: relative to the largest feature, and of the logarithm of a probability.
MEAN_TOLERANCE = 1e-3
LOG_TOLERANCE = 1e-2
SMALLEST = 1e-6
SMALLEST_SIDE = 3  # a map of 2 x 2 positions is exact, but too coarse


@dataclass(frozen=True)
class LinearHead:
    """The last layer of a bundle: ``weight`` (C, d), ``bias`` (C,), the temperature, and whether it normalizes embeddings.

    Scores are relative to the mean score of all classes, as probabilities only depend on differences of scores.
    """

    weight: Floats
    bias: Floats
    temperature: float
    normalizes: bool = False

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> LinearHead | None:
        """Read the last layer from a bundle's weights. Returns None if they have no layer of that name."""
        name = bundle.manifest["head"]
        try:
            with safe_open(bundle.path / (HEAD if bundle.lacks_weights else WEIGHTS), framework="numpy") as tensors:
                weight = tensors.get_tensor(f"{name}.weight")
                has_bias = f"{name}.bias" in tensors.keys()  # noqa: SIM118 - not a mapping
                bias = tensors.get_tensor(f"{name}.bias") if has_bias else np.zeros(len(weight))
        except (OSError, SafetensorError):
            return None
        weight = weight.reshape(len(weight), math.prod(weight.shape[1:])).astype(np.float32)
        return cls(
            weight - weight.mean(axis=0),
            (bias - bias.mean()).astype(np.float32),
            float(bundle.manifest["temperature"]),
            normalizes=bundle.normalizes_embedding,
        )

    def score_map(self, probabilities: Floats, embedding: Floats, feature_map: Floats, label: int) -> Floats | None:
        """Compute what each position adds to the score of a class.

        Args:
            probabilities: (C,) of one image.
            embedding: (d,), the input of the last layer.
            feature_map: (c, h, w), the last feature map.
            label: The index of the class.

        Returns:
            (h, w), whose mean plus the bias of the class is its score. None if the map would not be exact for this network.
        """
        if min(feature_map.shape[1:]) < SMALLEST_SIDE or embedding.shape != self.weight.shape[1:]:
            return None
        length = max(float(np.linalg.norm(embedding)), SMALLEST) if self.normalizes else 1.0
        weight = (self.weight / length).astype(np.float32)
        if not self._reproduces(probabilities, weight @ embedding + self.bias):
            return None
        for activation in ACTIVATIONS:
            contributions = activation(feature_map)
            if _is_mean(contributions, embedding):
                return np.tensordot(weight[label], contributions, axes=1).astype(np.float32)
        return None

    def _reproduces(self, probabilities: Floats, scores: Floats) -> bool:
        scores = scores / self.temperature
        log_expected = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        least = math.log(SMALLEST)
        difference = np.maximum(log_expected, least) - np.maximum(np.log(np.maximum(probabilities, SMALLEST)), least)
        return bool(np.abs(difference).max() <= LOG_TOLERANCE)


# The operation between the feature map and its mean; DenseNet has a ReLU.
ACTIVATIONS: tuple[Callable[[Floats], Floats], ...] = (lambda features: features, lambda features: np.maximum(features, 0))


def _is_mean(feature_map: Floats, embedding: Floats) -> bool:
    if len(feature_map) != len(embedding):
        return False
    difference = np.abs(feature_map.mean(axis=(1, 2)) - embedding).max()
    return bool(difference <= MEAN_TOLERANCE * max(float(np.abs(embedding).max()), SMALLEST))
