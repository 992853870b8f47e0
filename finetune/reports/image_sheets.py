"""Sheets of images with their predictions: confident mistakes, least certain and random correct images."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.data.image_files import read_image_file
from finetune.reports.plots import BLUE, ORANGE, TILE, printable
from models.artifacts.atomic_io import atomic_write
from models.artifacts.predictions import Predictions
from models.errors import ImageError
from models.preprocess import decode

MAX_IMAGES = 12
COLUMNS = 4
DPI = 110
TILE_PX, FRAME_PX, GAP_PX, CAPTION_PX, HEADER_PX = 270, 5, 16, 78, 64


def confident_mistakes(predictions: Predictions, label: int) -> NDArray[np.intp]:
    """Return the indices of up to 12 misclassified images of class ``label``, highest loss first."""
    wrong = np.flatnonzero((predictions.labels == label) & ~predictions.correct)
    return wrong[np.argsort(-predictions.losses[wrong], kind="stable")][:MAX_IMAGES]


def least_certain(predictions: Predictions, label: int) -> NDArray[np.intp]:
    """Return the indices of the up to 12 images of class ``label`` with the smallest margin between the top two classes."""
    if len(predictions.classes) < 2:
        return np.zeros(0, dtype=np.intp)
    members = np.flatnonzero(predictions.labels == label)
    top_two = np.sort(predictions.probabilities[members], axis=1)[:, -2:]
    return members[np.argsort(top_two[:, 1] - top_two[:, 0], kind="stable")][:MAX_IMAGES]


def random_correct(predictions: Predictions, label: int, *, seed: int) -> NDArray[np.intp]:
    """Return the sorted indices of a random sample of up to 12 correctly classified images of class ``label``."""
    correct = np.flatnonzero((predictions.labels == label) & predictions.correct)
    rng = np.random.default_rng([seed, label])
    return np.sort(rng.choice(correct, size=min(MAX_IMAGES, len(correct)), replace=False))


def image_sheet(predictions: Predictions, indices: NDArray[np.intp], title: str, data_dir: Path, path: Path) -> Path:
    """Draw the images at ``indices`` in up to four columns, each with file name, predicted class and p(true class).

    Frames are blue for correct and orange for incorrect predictions. A missing or damaged image is a gray tile with the reason.
    """
    columns = min(COLUMNS, max(2, len(indices)))  # at least two, to leave room for the title
    rows = -(-len(indices) // columns)
    width_px = columns * (TILE_PX + GAP_PX) + GAP_PX
    height_px = HEADER_PX + rows * (TILE_PX + CAPTION_PX)
    sheet = Image.new("RGB", (width_px, height_px), "white")
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI)

    def write(x_px: float, y_px: float, text: str, **style: Any) -> None:
        figure.text(x_px / width_px, 1 - y_px / height_px, text, **style)

    write(GAP_PX, HEADER_PX / 2, title, va="center", fontsize=12)
    for position, index in enumerate(indices.tolist()):
        left = GAP_PX + position % columns * (TILE_PX + GAP_PX)
        top = HEADER_PX + position // columns * (TILE_PX + CAPTION_PX)
        tile, error = _tile(data_dir / predictions.image_names[index], BLUE if predictions.correct[index] else ORANGE)
        sheet.paste(tile, (left, top))
        middle = left + TILE_PX / 2
        write(middle, top + TILE_PX / 2, error, ha="center", va="center")
        write(middle, top + TILE_PX + 6, _caption(predictions, index), ha="center", va="top", fontsize=9)
    figure.patch.set_alpha(0)
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no annotations
    canvas.draw()
    texts = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    sheet.paste(texts, mask=texts)  # matplotlib would convert the photos to float, which takes 130 MB
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="png", compress_level=3)
    return path


def _caption(predictions: Predictions, index: int) -> str:
    true, predicted = predictions.labels[index], predictions.predicted[index]
    p_true = predictions.probabilities[index, true]
    shown = f"{p_true:.3f}" if p_true >= 0.001 else f"{p_true:.0e}"
    file = printable(PurePosixPath(predictions.image_names[index]).name, 32)
    names = [printable(predictions.classes[k], 22) for k in (predicted, true)]
    return f"{file}\npredicted {names[0]}\np({names[1]}) = {shown}"


def _tile(path: Path, color: str) -> tuple[Image.Image, str]:
    """Return the complete image centered in a framed gray square, and an error text if it could not be read."""
    inner_px = TILE_PX - 2 * FRAME_PX
    tile = ImageOps.expand(Image.new("RGB", (inner_px, inner_px), TILE), FRAME_PX, color)
    try:
        data = read_image_file(path)
    except FileNotFoundError:
        return tile, "photo is missing"
    except (OSError, ImageError):
        return tile, "photo cannot be read"
    try:
        image = decode(data)
    except ImageError:
        return tile, "photo cannot be decoded"
    image = ImageOps.contain(image, (inner_px, inner_px))
    tile.paste(image, ((TILE_PX - image.width) // 2, (TILE_PX - image.height) // 2))
    return tile, ""
