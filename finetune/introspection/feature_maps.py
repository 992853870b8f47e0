"""Visualize a network: the filters of its first layer and the feature maps of an image.

The sheets follow figure 3 of Krizhevsky et al. (2012) and figure 2 of Zeiler and Fergus (2013).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from finetune.export.full_bundle import open_full_bundle
from finetune.io.output_folder import require_empty_folder
from finetune.reports.plots import report_style, save_png
from models.artifacts.bundle import Bundle
from models.errors import BundleError, ConfigError, DataError
from models.networks.classifier import Classifier, load_classifier
from models.networks.hooks import forward_hooks, layer_names

FILTER_PX, MAP_PX, INPUT_PX = 60, 112, 224
DPI = 110
GAP_PX, NUMBER_PX, TITLE_PX, MARGIN_PX = 6, 15, 44, 12
MIN_SHEET_PX = 640
MAX_COLUMNS = 16
MAX_FILTERS = 256
MAX_CONVOLUTIONS = 16  # networks with more convolutions are shown by stage
Maps = NDArray[np.float32]


@dataclass(frozen=True)
class Visualization:
    """The written files: the sheet of filters, and the network's input followed by a sheet of feature maps per layer."""

    filters: Path
    maps: list[Path]


def visualize_bundle(
    bundle_dir: Path, *, out: Path | None = None, photo: Path | None = None, max_maps: int = 32
) -> Visualization:
    """Draw the filters of a bundle's network and the feature maps of a photo.

    Args:
        bundle_dir: The bundle.
        out: A new or empty folder. None: visualizations/BUNDLE.
        photo: The image file, if feature maps are requested.
        max_maps: Max number of maps per sheet.

    Raises:
        ConfigError: ``max_maps`` is below 1.
        DataError: ``photo`` does not exist, or ``out`` is not empty.
        ImageError: ``photo`` is not a readable image.
    """
    if max_maps < 1:
        raise ConfigError(f"--maps must be at least 1 (got {max_maps}).")
    bundle = open_full_bundle(bundle_dir, needs_weights=True)
    out = out or Path("visualizations") / bundle.name
    require_empty_folder(out)
    classifier = load_classifier(bundle)
    with report_style():
        maps = draw_maps(classifier, bundle, photo, out / "maps", max_maps=max_maps) if photo else []
        return Visualization(draw_filters(classifier, out / "filters.png", name=bundle.name), maps)


def draw_filters(classifier: Classifier, path: Path, *, name: str) -> Path:
    """Write the filters of the first layer as one sheet, in color for three channels, else in gray, channel by channel."""
    layer_name, weights = first_layer_filters(classifier)
    count, channels, height, width = weights.shape
    shown = min(count, MAX_FILTERS)
    selection = f"{count}" if shown == count else f"first {shown} of {count}"
    title = (
        f"{name}, {layer_name}: {selection} filters of {height} x {width} px, {channels} channel{'' if channels == 1 else 's'}"
    )
    tile_px = max(FILTER_PX, 4 * max(height, width))
    if channels in (1, 3):
        tiles = [to_gray_levels(weights[i].transpose(1, 2, 0).squeeze()) for i in range(shown)]
        return tile_sheet(tiles, path, title=title, tile_px=tile_px)
    tiles = [to_gray_levels(weights[i, channel]) for channel in range(channels) for i in range(shown)]
    labels = [f"{i}, ch {channel}" for channel in range(channels) for i in range(shown)]
    return tile_sheet(tiles, path, title=title, tile_px=tile_px, columns=min(shown, 16), labels=labels)


def first_layer_filters(classifier: Classifier) -> tuple[str, Maps]:
    """Return the name and the weights (filters, channels, h, w) of the first convolution, or else of the first linear layer.

    A linear layer has a weight for each pixel, so its filters have the size of the input. A pixel permutation is undone.

    Raises:
        BundleError: The network has no such layer.
    """
    net = classifier.net
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            return name, layer.weight.detach().numpy()
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            channels = classifier.normalize.scale.shape[1]
            side = round((layer.in_features / channels) ** 0.5)
            weights = layer.weight.detach().reshape(-1, channels, side * side)
            if classifier.normalize.is_permuting:
                ordered = torch.empty_like(weights)
                ordered[:, :, classifier.normalize.order] = weights
                weights = ordered
            return name, weights.reshape(-1, channels, side, side).numpy()
    raise BundleError("The network has no convolution or linear layer to draw. Use a bundle of another network.")


def map_layers(net: nn.Module) -> list[str]:
    """Return the layers to visualize: all convolutions, or the stages of a network with many convolutions."""
    convolutions = layer_names(net, nn.Conv2d)
    if not convolutions:
        return layer_names(net, nn.Linear)
    return convolutions if len(convolutions) <= MAX_CONVOLUTIONS else _stages(net, "", len(convolutions))


def _stages(module: nn.Module, prefix: str, total: int) -> list[str]:
    """Return the children with convolutions, and split a child that contains over half of them."""
    stages = []
    for name, child in module.named_children():
        count = sum(isinstance(layer, nn.Conv2d) for layer in child.modules())
        path = f"{prefix}{name}"
        if count * 2 > total and not isinstance(child, nn.Conv2d):
            stages += _stages(child, f"{path}.", total)
        elif count:
            stages.append(path)
    return stages


@torch.inference_mode()
def compute_feature_maps(classifier: Classifier, pixels: NDArray[np.uint8]) -> list[tuple[str, Maps]]:
    """Return the outputs (maps, h, w) of the ``map_layers`` for one crop (h, w, C), in execution order."""
    outputs: list[tuple[str, Maps]] = []

    def record(name: str, input_: Tensor, output: Tensor) -> None:
        maps = output[0].float()
        outputs.append((name, (maps if maps.ndim == 3 else maps.reshape(1, 1, -1)).numpy()))

    with forward_hooks(classifier.net, map_layers(classifier.net), record):
        classifier(torch.from_numpy(pixels[None].copy()))
    return outputs


def draw_maps(classifier: Classifier, bundle: Bundle, image: Path, folder: Path, *, max_maps: int) -> list[Path]:
    """Write the network's input for an image and a sheet of feature maps for each layer.

    Args:
        classifier: The network.
        bundle: Its bundle.
        image: The image file.
        folder: The folder for the sheets.
        max_maps: Max number of maps per sheet.

    Returns:
        The written files, the input first.

    Raises:
        DataError: The file does not exist.
        ImageError: The file is not a readable image.
    """
    try:
        pixels = bundle.preprocessing.pixels(image.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"No such photo: {image}. Pass a file with --photo.") from None
    crops, labels = [pixels.squeeze()], ["as cropped"]
    if classifier.normalize.is_permuting:
        flat = pixels.reshape(-1, pixels.shape[2])[classifier.normalize.order.numpy()]
        crops, labels = [*crops, flat.reshape(pixels.shape).squeeze()], [*labels, "as permuted by the network"]
    height, width, channels = pixels.shape
    title = f"{bundle.name}: the input, {channels} x {height} x {width}"
    written = [tile_sheet(crops, folder / "00-input.png", title=title, tile_px=INPUT_PX, labels=labels)]
    for number, (name, maps) in enumerate(compute_feature_maps(classifier, pixels), start=1):
        count, rows, columns = maps.shape
        shown = f"{count} map{'' if count == 1 else 's'}" if count <= max_maps else f"first {max_maps} of {count} maps"
        file = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._]+', '-', name)}.png"
        title = f"{name}: {count} x {rows} x {columns}, {shown}"
        written.append(tile_sheet([to_gray_levels(one) for one in maps[:max_maps]], file, title=title, tile_px=MAP_PX))
    return written


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
