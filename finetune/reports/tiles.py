"""Sheets of small images, enlarged without smoothing, with a label under each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from finetune.reports.plots import save_png

DPI = 110
GAP_PX, NUMBER_PX, TITLE_PX, MARGIN_PX = 6, 15, 44, 12
MIN_SHEET_PX = 640
MAX_COLUMNS = 16


def to_gray_levels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale values to 0 (the minimum, black) to 255 (the maximum, white). Constant arrays become 128. Keeps the shape."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.full(values.shape, 128, np.uint8)
    return ((values - low) * (255 / (high - low))).round().astype(np.uint8)


def tile_sheet(
    images: Sequence[NDArray[np.uint8]], path: Path, *, title: str, tile_px: int, columns: int = 0, labels: Sequence[str] = ()
) -> Path:
    """Write a sheet of images as a PNG.

    Args:
        images: Images of shape (h, w) or (h, w, 3).
        path: The PNG file.
        title: The title above the images.
        tile_px: Smaller images are enlarged by an integer factor, so that the longer side is at most this.
        columns: Number of columns. 0: chosen by the number of images.
        labels: Text under each image. Default: numbers from 0.
    """
    tiles = [_enlarge(image, tile_px) for image in images]
    tile_width = max(tile.width for tile in tiles) + GAP_PX
    min_columns = (MIN_SHEET_PX - 2 * MARGIN_PX) // tile_width
    columns = columns or max(min_columns, min(MAX_COLUMNS, int(np.ceil(np.sqrt(2 * len(images))))))
    rows = -(-len(images) // columns)
    tile_height = max(tile.height for tile in tiles) + NUMBER_PX + GAP_PX
    width_px = max(MIN_SHEET_PX, columns * tile_width + 2 * MARGIN_PX)
    height_px = TITLE_PX + rows * tile_height + MARGIN_PX
    canvas = Image.new("RGB", (width_px, height_px), "white")
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI)
    figure.text(MARGIN_PX / width_px, 1 - TITLE_PX / 2 / height_px, title, va="center", fontsize=10)
    for position, tile in enumerate(tiles):
        left, top = MARGIN_PX + position % columns * tile_width, TITLE_PX + position // columns * tile_height
        canvas.paste(tile.convert("RGB"), (left, top))
        x, y = (left + tile.width / 2) / width_px, 1 - (top + tile.height + 2) / height_px
        figure.text(x, y, labels[position] if labels else str(position), ha="center", va="top", fontsize=7)
    figure.figimage(np.asarray(canvas), zorder=-1)
    return save_png(figure, path)


def _enlarge(image: NDArray[np.uint8], tile_px: int) -> Image.Image:
    tile = Image.fromarray(image)
    factor = max(1, tile_px // max(tile.size))
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
