"""Occlusion (Zeiler and Fergus 2014, arXiv 1311.2901): cover a part of the photo, and see how much a class suffers.

It asks nothing of the network but its answers. The cost is one answer for each place of the patch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from models.runtime.openvino_engine import Pixels

GRID_SIZE = 8  # along each side
PATCH_SIZE = 3  # cells that the patch covers along each side; it moves by one
FORWARD_PASSES = (GRID_SIZE - PATCH_SIZE + 1) ** 2 + 1
BLUR = 1 / 14  # of a side, the radius of the blur that takes a photo's details away
SMALLEST = 1e-7

Floats = NDArray[np.float32]


def occlusion_map(run: Callable[[Pixels], Floats], pixels: Pixels, label: int, *, fill: Pixels) -> Floats:
    """How much the log-odds of class ``label`` fall where the photo is covered: (CELLS, CELLS), the mean over patches.

    ``run`` gives the probabilities (1, classes) of pixels (1, H, W, C), and is asked PASSES times, one photo at a time, so that
    memory is that of one. ``pixels`` is (H, W, C), and ``fill``, of the same shape, what a patch shows instead. Log-odds and
    not probabilities: those of a photo that is certain hardly move.
    """
    edges = np.linspace(0, pixels.shape[0], GRID_SIZE + 1).round().astype(int)
    whole = _log_odds(run(pixels[None])[0], label)
    fall, covered = np.zeros((GRID_SIZE, GRID_SIZE)), np.zeros((GRID_SIZE, GRID_SIZE))
    for y in range(GRID_SIZE - PATCH_SIZE + 1):
        for x in range(GRID_SIZE - PATCH_SIZE + 1):
            part = slice(edges[y], edges[y + PATCH_SIZE]), slice(edges[x], edges[x + PATCH_SIZE])
            patched = pixels.copy()
            patched[part] = fill[part]
            cells = slice(y, y + PATCH_SIZE), slice(x, x + PATCH_SIZE)
            fall[cells] += whole - _log_odds(run(patched[None])[0], label)
            covered[cells] += 1
    return (fall / covered).astype(np.float32)


def blur(pixels: Pixels) -> Pixels:
    """The photo without its details, (H, W, C) as it came.

    A patch of it has no edges that a network would take for something, as a grey one has (Fong and Vedaldi 2017, arXiv
    1704.03296).
    """
    photo = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return np.asarray(photo.filter(ImageFilter.GaussianBlur(pixels.shape[0] * BLUR))).reshape(pixels.shape)


def _log_odds(probabilities: Floats, label: int) -> float:
    others = float(np.delete(probabilities, label).sum())  # 1 - p would lose all digits where p is near 1
    return float(np.log(max(float(probabilities[label]), SMALLEST)) - np.log(max(others, SMALLEST)))
