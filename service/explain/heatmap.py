"""Heat over a photo, in colours that are as far apart for the eye as the numbers are, for colour-blind eyes too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.runtime.openvino_engine import Pixels
from service.images.render import encode_png

# Every eighth of the 256 colours of viridis (Smith and van der Walt 2015, matplotlib, CC0); between them 2 levels off at most.
VIRIDIS = (
    "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e 297a8e 26828e 23898e 21908c "
    "1f978b 1f9f88 21a685 27ad81 31b57b 3ebc74 4dc26c 5cc863 6ece58 82d34d 95d840 aadc32 c0df25 d5e21a eae51a fde725"
)
MIN_OPACITY, MAX_OPACITY = 0.35, 0.75  # how much of the colour covers the photo where heat is 0 and where it is 1
GREY = (0.299, 0.587, 0.114)

Floats = NDArray[np.float32]


def apply_colormap(heat: Floats) -> NDArray[np.float32]:
    """Numbers from 0 to 1, of any shape, -> RGB from 0 to 255 in a last axis: 0 is dark violet and 1 yellow."""
    anchors = np.array([tuple(bytes.fromhex(word)) for word in VIRIDIS.split()], float)
    at = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(heat, at, anchors[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


def overlay(pixels: Pixels, heat: Floats) -> bytes:
    """The photo in grey with the heat over it, as PNG; pixels (H, W, C) uint8 and heat (H, W) from 0 to 1.

    The photo's own colours are left out, as they would be taken for heat.
    """
    grey = (
        pixels[..., 0].astype(np.float32) if pixels.shape[-1] == 1 else pixels.astype(np.float32) @ np.array(GREY, np.float32)
    )
    cover = (MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * heat)[..., None]
    mixed = (1 - cover) * grey[..., None] + cover * apply_colormap(heat)
    return encode_png(mixed.round().clip(0, 255).astype(np.uint8))


def legend(*, width_px: int = 256, height_px: int = 12) -> bytes:
    """The colours from 0, at the left, to 1, as PNG."""
    row = apply_colormap(np.linspace(0, 1, width_px, dtype=np.float32)).round().astype(np.uint8)
    return encode_png(np.repeat(row[None], height_px, axis=0))
