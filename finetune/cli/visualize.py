"""``finetune visualize``: draw the filters of a network and the feature maps of a photo."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.cli.arguments import BUNDLE, add_folder
from finetune.io.progress import step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, BUNDLE, "bundle to visualize", required=True)
    parser.add_argument("--photo", type=Path, metavar="FILE", help="also draw the feature maps of this photo")
    parser.add_argument("--maps", type=int, default=32, metavar="N", help="max maps per layer (default: 32)")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="folder for the images (default: visualizations/BUNDLE)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune visualize``: draw the filters and, with ``--photo``, the feature maps."""
    with step("Loading PyTorch"):
        from finetune.introspection.feature_maps import visualize_bundle

    written = visualize_bundle(args.bundle, out=args.output_dir, photo=args.photo, max_maps=args.maps)
    print(f"filters      {written.filters}")
    if written.maps:
        print(f"maps         {written.maps[0].parent}: {len(written.maps)} images, the input first")
    return 0
