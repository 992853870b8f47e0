"""What a network looks for and what it sees: its first layer's filters, and the maps that a photo leaves in each layer.

As in figures 3 of Krizhevsky et al. (2012) and 2 of Zeiler and Fergus (2013): a filter is a picture of what it answers to.
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
MAX_CONVOLUTIONS = 16  # a network with more convolutions than that is shown by stages
Maps = NDArray[np.float32]


def draw_filters(classifier: Classifier, path: Path, *, name: str) -> Path:
    """Write the first layer's filters as one sheet: in colour for three channels, else a row of grey ones a channel."""
    layer_name, weights = first_layer_filters(classifier)
    count, channels, height, width = weights.shape
    shown = min(count, MAX_FILTERS)
    of = f"{count}" if shown == count else f"the first {shown} of {count}"
    title = f"{name}, {layer_name}: {of} filters of {height} x {width} px, {channels} channel{'' if channels == 1 else 's'}"
    tile_px = max(FILTER_PX, 4 * max(height, width))
    if channels in (1, 3):
        tiles = [to_gray_levels(weights[i].transpose(1, 2, 0).squeeze()) for i in range(shown)]
        return tile_sheet(tiles, path, title=title, tile_px=tile_px)
    tiles = [to_gray_levels(weights[i, channel]) for channel in range(channels) for i in range(shown)]
    labels = [f"{i}, ch {channel}" for channel in range(channels) for i in range(shown)]
    return tile_sheet(tiles, path, title=title, tile_px=tile_px, columns=min(shown, 16), labels=labels)


def first_layer_filters(classifier: Classifier) -> tuple[str, Maps]:
    """The name and the weights (filters, channels, h, w) of the first convolution, or of the first Linear layer that there is.

    A Linear layer has a weight for each pixel: its filters are as large as the picture, each pixel where it is in the photo.
    Raises BundleError for a network that has neither.
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
                unmixed = torch.empty_like(weights)
                unmixed[:, :, classifier.normalize.order] = weights
                weights = unmixed
            return name, weights.reshape(-1, channels, side, side).numpy()
    raise BundleError("The network has neither a convolution nor a Linear layer to draw; give a bundle of another one.")


def map_layers(net: nn.Module) -> list[str]:
    """The layers whose maps are worth a picture: each convolution, or the stages of a network that has many of them."""
    convolutions = layer_names(net, nn.Conv2d)
    if not convolutions:
        return layer_names(net, nn.Linear)
    return convolutions if len(convolutions) <= MAX_CONVOLUTIONS else _split(net, "", len(convolutions))


def _split(module: nn.Module, prefix: str, total: int) -> list[str]:
    """The children that hold convolutions; one that holds over half of all is looked into."""
    found = []
    for name, child in module.named_children():
        count = sum(isinstance(layer, nn.Conv2d) for layer in child.modules())
        path = f"{prefix}{name}"
        if count * 2 > total and not isinstance(child, nn.Conv2d):
            found += _split(child, f"{path}.", total)
        elif count:
            found.append(path)
    return found


@torch.inference_mode()
def compute_feature_maps(classifier: Classifier, pixels: NDArray[np.uint8]) -> list[tuple[str, Maps]]:
    """What each of the ``map_layers`` gives for one crop (h, w, C), in the order in which they run: (maps, h, w)."""
    found: list[tuple[str, Maps]] = []

    def look(name: str, given: Tensor, result: Tensor) -> None:
        maps = result[0].float()
        found.append((name, (maps if maps.ndim == 3 else maps.reshape(1, 1, -1)).numpy()))

    with forward_hooks(classifier.net, map_layers(classifier.net), look):
        classifier(torch.from_numpy(pixels[None].copy()))
    return found


def draw_maps(classifier: Classifier, bundle: Bundle, photo: Path, folder: Path, *, max_maps: int) -> list[Path]:
    """Write what the network is given of ``photo``, then a sheet for each stage; raises ImageError, DataError."""
    try:
        pixels = bundle.preprocessing.pixels(photo.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"There is no photo {photo}; name a file with --photo.") from None
    crops, labels = [pixels.squeeze()], ["as cropped"]
    if classifier.normalize.is_permuting:
        flat = pixels.reshape(-1, pixels.shape[2])[classifier.normalize.order.numpy()]
        crops, labels = [*crops, flat.reshape(pixels.shape).squeeze()], [*labels, "as the network gets it"]
    height, width, channels = pixels.shape
    title = f"{bundle.name}: the input, {channels} x {height} x {width}"
    written = [tile_sheet(crops, folder / "00-input.png", title=title, tile_px=INPUT_PX, labels=labels)]
    for number, (name, maps) in enumerate(compute_feature_maps(classifier, pixels), start=1):
        count, rows, columns = maps.shape
        shown = f"{count} map{'' if count == 1 else 's'}" if count <= max_maps else f"the first {max_maps} of {count} maps"
        file = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._]+', '-', name)}.png"
        title = f"{name}: {count} x {rows} x {columns}, {shown}"
        written.append(tile_sheet([to_gray_levels(one) for one in maps[:max_maps]], file, title=title, tile_px=MAP_PX))
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle to look into")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="also draw what this photo leaves in each layer")
    parser.add_argument("--maps", type=int, default=32, metavar="N", help="maps of a layer to draw at most (default: 32)")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="where the pictures go (default: visualizations/BUNDLE)")


def run(args: argparse.Namespace) -> int:
    """``finetune visualize``: draw the filters and, with ``--photo``, the maps."""
    if args.maps < 1:
        raise ConfigError(f"--maps is {args.maps}, and takes 1 or more.")
    bundle = open_full_bundle(args.bundle)
    out = args.output_dir or Path("visualizations") / bundle.name
    require_empty_folder(out)
    classifier = load_classifier(bundle)
    with plots.report_style():
        written = draw_maps(classifier, bundle, args.photo, out / "maps", max_maps=args.maps) if args.photo else []
        print(f"filters      {draw_filters(classifier, out / 'filters.png', name=bundle.name)}")
    if written:
        print(f"maps         {out / 'maps'}: {len(written)} pictures, the input first")
    return 0
