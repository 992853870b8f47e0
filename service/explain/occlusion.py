"""Occlusion maps (Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901): cover a patch and measure the effect on a class.

This works for every network, with one forward pass per position of the patch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from models.runtime.openvino_engine import Pixels

GRID_SIZE = 8  # along each side
PATCH_SIZE = 3  # grid cells along each side; the patch moves by one cell
FORWARD_PASSES = (GRID_SIZE - PATCH_SIZE + 1) ** 2 + 1
BLUR = 1 / 14  # the radius of the blur, relative to a side
SMALLEST = 1e-7

Floats = NDArray[np.float32]


def occlusion_map(run: Callable[[Pixels], Floats], pixels: Pixels, label: int, *, fill: Pixels) -> Floats:
    """Compute how much the log-odds of a class fall where the image is covered.

    Log-odds are used because the probability of a confident prediction hardly changes.

    Args:
        run: Returns the (1, C) probabilities of (1, H, W, C) pixels. It is called FORWARD_PASSES times.
        pixels: (H, W, C) uint8.
        label: The index of the class.
        fill: (H, W, C), what a patch shows instead.

    Returns:
        (GRID_SIZE, GRID_SIZE), the mean over the patches that cover a grid cell.
    """
    edges = np.linspace(0, pixels.shape[0], GRID_SIZE + 1).round().astype(int)
    original = _log_odds(run(pixels[None])[0], label)
    fall, covered = np.zeros((GRID_SIZE, GRID_SIZE)), np.zeros((GRID_SIZE, GRID_SIZE))
    for y in range(GRID_SIZE - PATCH_SIZE + 1):
        for x in range(GRID_SIZE - PATCH_SIZE + 1):
            region = slice(edges[y], edges[y + PATCH_SIZE]), slice(edges[x], edges[x + PATCH_SIZE])
            patched = pixels.copy()
            patched[region] = fill[region]
            cells = slice(y, y + PATCH_SIZE), slice(x, x + PATCH_SIZE)
            fall[cells] += original - _log_odds(run(patched[None])[0], label)
            covered[cells] += 1
    return (fall / covered).astype(np.float32)


def blur(pixels: Pixels) -> Pixels:
    """Blur an image of shape (H, W, C).

    Unlike a gray patch, a blurred one has no edges (Fong and Vedaldi 2017, https://arxiv.org/abs/1704.03296).
    """
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(pixels.shape[0] * BLUR))).reshape(pixels.shape)


def _log_odds(probabilities: Floats, label: int) -> float:
    others = float(np.delete(probabilities, label).sum())  # 1 - p loses all digits if p is near 1
    return float(np.log(max(float(probabilities[label]), SMALLEST)) - np.log(max(others, SMALLEST)))
