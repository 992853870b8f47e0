"""Visualize a network: the filters of its first layer and the feature maps of an image: ``finetune visualize``.

The sheets follow figure 3 of Krizhevsky et al. (2012) and figure 2 of Zeiler and Fergus (2013).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.export.merge_head import open_full_bundle
from finetune.io.output_folder import require_empty_folder
from finetune.reports import plots
from finetune.reports.tiles import tile_sheet, to_gray_levels
from models.artifacts.bundle import Bundle
from models.errors import BundleError, ConfigError, DataError
from models.networks.classifier import Classifier, load_classifier
from models.networks.hooks import forward_hooks, layer_names

FILTER_PX, MAP_PX, INPUT_PX = 60, 112, 224
MAX_FILTERS = 256
MAX_CONVOLUTIONS = 16  # networks with more convolutions are shown by stage
Maps = NDArray[np.float32]


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="bundle to visualize")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="also draw the feature maps of this photo")
    parser.add_argument("--maps", type=int, default=32, metavar="N", help="max maps per layer (default: 32)")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="folder for the images (default: visualizations/BUNDLE)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune visualize``: draw the filters and, with ``--photo``, the feature maps."""
    if args.maps < 1:
        raise ConfigError(f"--maps must be at least 1 (got {args.maps}).")
    bundle = open_full_bundle(args.bundle, needs_weights=True)
    out = args.output_dir or Path("visualizations") / bundle.name
    require_empty_folder(out)
    classifier = load_classifier(bundle)
    with plots.report_style():
        written = draw_maps(classifier, bundle, args.photo, out / "maps", max_maps=args.maps) if args.photo else []
        print(f"filters      {draw_filters(classifier, out / 'filters.png', name=bundle.name)}")
    if written:
        print(f"maps         {out / 'maps'}: {len(written)} images, the input first")
    return 0
