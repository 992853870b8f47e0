"""Draw heat maps over images with the viridis colormap, which is perceptually uniform and safe for color-blind people."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.runtime.openvino_engine import Pixels
from service.images.render import encode_png

# Every eighth color of viridis (Smith and van der Walt 2015, matplotlib, CC0). Interpolation is off by at most 2 levels.
VIRIDIS = (
    "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e 297a8e 26828e 23898e 21908c "
    "1f978b 1f9f88 21a685 27ad81 31b57b 3ebc74 4dc26c 5cc863 6ece58 82d34d 95d840 aadc32 c0df25 d5e21a eae51a fde725"
)
MIN_OPACITY, MAX_OPACITY = 0.35, 0.75  # of the color where the heat is 0 and where it is 1
LUMA = (0.299, 0.587, 0.114)

Floats = NDArray[np.float32]


def apply_colormap(heat: Floats) -> NDArray[np.float32]:
    """Map values from 0 (dark violet) to 1 (yellow), of any shape, to RGB from 0 to 255 in an additional last axis."""
    anchors = np.array([tuple(bytes.fromhex(word)) for word in VIRIDIS.split()], float)
    at = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(heat, at, anchors[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


def overlay(pixels: Pixels, heat: Floats) -> bytes:
    """Draw a heat map over an image in gray, whose colors could be mistaken for heat.

    Args:
        pixels: (H, W, C) uint8.
        heat: (H, W) from 0 to 1.

    Returns:
        A PNG file.
    """
    image = pixels.astype(np.float32)
    gray = image[..., 0] if pixels.shape[-1] == 1 else image @ np.array(LUMA, np.float32)
    opacity = (MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * heat)[..., None]
    mixed = (1 - opacity) * gray[..., None] + opacity * apply_colormap(heat)
    return encode_png(mixed.round().clip(0, 255).astype(np.uint8))


def legend(*, width_px: int = 256, height_px: int = 12) -> bytes:
    """Draw the colors from 0 (left) to 1 as a PNG file."""
    row = apply_colormap(np.linspace(0, 1, width_px, dtype=np.float32)).round().astype(np.uint8)
    return encode_png(np.repeat(row[None], height_px, axis=0))
