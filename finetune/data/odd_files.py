"""Find odd files: dark, bright or blurred photos, and photos of an unusual shape or size.

The definitions and thresholds are those of `cleanvision <https://github.com/cleanlab/cleanvision>`_ 0.3. Brightness and blur
are measured on a reduced image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageStat

DARK_BELOW, BRIGHT_ABOVE = 0.32, 0.95  # brightness from 0 to 1 of the lightest and of the darkest pixels
DARK_PERCENTILE, BRIGHT_PERCENTILE = 99, 5
BLURRED_BELOW, BLUR_SCALE, MAX_BLUR_CONTRAST = 0.29, 0.01, 0.18
BLUR_PX = 64
ODD_SHAPE_BELOW = 0.35  # the shorter side divided by the longer one
SIZE_IQRS = 3.0  # interquartile ranges below or above the quartiles of the dataset
RED, GREEN, BLUE = 0.241, 0.691, 0.068  # weights of the squared channels in the perceived brightness
MEASURES = 6  # lightest, darkest, sharpness, histogram, width, height


def measure_image(image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """Measure an RGB image.

    Args:
        image: The image, which may have been decoded at a reduced size.
        size: Its full width and height.

    Returns:
        (MEASURES,): the 99th and the 5th percentile of the brightness, the spread of the edges, that of the histogram, and
        the size.
    """
    small = image.reduce(max(1, min(image.size) // 128))
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float32), -1, 0)
    brightness = np.sqrt(RED * red**2 + GREEN * green**2 + BLUE * blue**2) / 255
    scale = max(1.0, max(image.size) / BLUR_PX)
    gray = small.resize([max(1, int(side / scale)) for side in image.size]).convert("L")
    edges = ImageStat.Stat(gray.filter(ImageFilter.FIND_EDGES)).var[0] ** 0.5
    lightest, darkest = np.percentile(brightness, [DARK_PERCENTILE, BRIGHT_PERCENTILE])
    return np.array([lightest, darkest, edges, np.std(gray.histogram()), *size], dtype=np.float32)


def find_odd_files(measures: NDArray[np.float32]) -> list[str]:
    """Name what is odd about each image of a dataset, such as "dark, odd shape"; empty for most.

    Args:
        measures: (N, MEASURES) results of ``measure_image``.
    """
    lightest, darkest, edges, histogram, width, height = measures.astype(np.float64).T
    is_flat = 1 - np.exp(-BLUR_SCALE * histogram) <= MAX_BLUR_CONTRAST  # of many gray levels, unlike a drawing
    side = np.sqrt(width * height)
    first, third = np.percentile(side, [25, 75]) if len(side) else (0.0, 0.0)
    reach = SIZE_IQRS * (third - first)
    is_large = np.maximum(width, height) >= BLUR_PX  # smaller ones have too few pixels to tell
    found = {
        "dark": lightest < DARK_BELOW,
        "bright": darkest > BRIGHT_ABOVE,
        "blurred": (1 - np.exp(-BLUR_SCALE * edges) < BLURRED_BELOW) & is_flat & is_large,
        "odd shape": np.minimum(width, height) < ODD_SHAPE_BELOW * np.maximum(width, height),
        "odd size": (side < first - reach) | (side > third + reach),
    }
    return [", ".join(name for name, mask in found.items() if mask[i]) for i in range(len(measures))]


def odd_file_column(measures: Sequence[NDArray[np.float32]]) -> tuple[str, ...]:
    """Return the column ``odd_file`` of a table of predictions; empty if no image is odd."""
    column = find_odd_files(np.array(measures, dtype=np.float32).reshape(-1, MEASURES))
    return tuple(column) if any(column) else ()
