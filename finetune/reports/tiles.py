"""Small pictures, enlarged without smoothing, side by side on one sheet, a number under each."""

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


def to_gray_levels(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """From its smallest number, black, to its largest, white; one that is flat is mid-grey. Keeps the shape."""
    low, high = float(picture.min()), float(picture.max())
    if high <= low:
        return np.full(picture.shape, 128, np.uint8)
    return ((picture - low) * (255 / (high - low))).round().astype(np.uint8)


def tile_sheet(
    pictures: Sequence[NDArray[np.uint8]], path: Path, *, title: str, tile_px: int, columns: int = 0, labels: Sequence[str] = ()
) -> Path:
    """Write ``pictures``, each (h, w) or (h, w, 3), as a PNG, under ``title``, numbered from 0 where no ``labels`` are given.

    Each is enlarged by a whole number, to ``tile_px`` at most on its longer side where it is smaller than that.
    """
    tiles = [_enlarged(picture, tile_px) for picture in pictures]
    wide = max(tile.width for tile in tiles) + GAP_PX
    fitting = (MIN_SHEET_PX - 2 * MARGIN_PX) // wide
    columns = columns or max(fitting, min(MAX_COLUMNS, int(np.ceil(np.sqrt(2 * len(pictures))))))
    rows = -(-len(pictures) // columns)
    high = max(tile.height for tile in tiles) + NUMBER_PX + GAP_PX
    width_px = max(MIN_SHEET_PX, columns * wide + 2 * MARGIN_PX)
    height_px = TITLE_PX + rows * high + MARGIN_PX
    canvas = Image.new("RGB", (width_px, height_px), "white")
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI)
    figure.text(MARGIN_PX / width_px, 1 - TITLE_PX / 2 / height_px, title, va="center", fontsize=10)
    for place, tile in enumerate(tiles):
        left, top = MARGIN_PX + place % columns * wide, TITLE_PX + place // columns * high
        canvas.paste(tile.convert("RGB"), (left, top))
        x, y = (left + tile.width / 2) / width_px, 1 - (top + tile.height + 2) / height_px
        figure.text(x, y, labels[place] if labels else str(place), ha="center", va="top", fontsize=7)
    figure.figimage(np.asarray(canvas), zorder=-1)
    return save_png(figure, path)


def _enlarged(picture: NDArray[np.uint8], tile_px: int) -> Image.Image:
    tile = Image.fromarray(picture)
    times = max(1, tile_px // max(tile.size))
    return tile.resize((tile.width * times, tile.height * times), Image.Resampling.NEAREST)
