"""Data augmentation: random resized crop, horizontal flip and color jitter.

The ranges are those of torchvision's RandomResizedCrop and common ImageNet recipes. The random numbers depend only on seed,
epoch and image, so they do not change with threads or when a run is resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from models.preprocess import INTERPOLATIONS, Preprocessing

AREA_RANGE = (0.35, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)
JITTER = 0.2


@dataclass(frozen=True)
class Augment:
    """Random augmentation for a network's input."""

    preprocessing: Preprocessing
    seed: int

    def crop(self, image: Image.Image, *, epoch: int, index: int) -> NDArray[np.uint8]:
        """Return a random view of an RGB image, (input_px, input_px, channels) uint8."""
        rng = np.random.default_rng((self.seed, epoch, index))
        side = self.preprocessing.input_px
        view = image.resize((side, side), INTERPOLATIONS[self.preprocessing.interpolation], _random_box(image.size, rng))
        if rng.random() < 0.5:
            view = ImageOps.mirror(view)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
        pixels = np.asarray(view.convert("RGB" if self.preprocessing.channels == 3 else "L"))
        return pixels.reshape(side, side, self.preprocessing.channels)


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw a box of random area and aspect ratio within the image, (left, top, right, bottom) in pixels."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*AREA_RANGE)
        aspect = math.exp(rng.uniform(math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
