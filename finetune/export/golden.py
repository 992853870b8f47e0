"""Golden inputs of a bundle: generated images, so that a bundle contains no photos."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.preprocess import Preprocessing

NUM_GOLDEN = 4


def golden_pixels(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Draw four reproducible images of flat shapes, (4, input_px, input_px, channels) uint8."""
    return np.stack([preprocessing.crop(_draw(random.Random(seed))) for seed in range(NUM_GOLDEN)])


def _draw(rng: random.Random) -> Image.Image:
    def color() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", (320, 256), color())
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, w, h = rng.randrange(280), rng.randrange(220), rng.randrange(20, 160), rng.randrange(20, 120)
        rng.choice((pen.ellipse, pen.rectangle))((x, y, x + w, y + h), fill=color())
    return image
