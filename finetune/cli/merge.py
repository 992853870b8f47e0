"""``finetune merge``: add the pretrained weights to a bundle without the full weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.cli.arguments import BUNDLE, add_folder
from models.artifacts.bundle import open_bundle
from models.errors import BundleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, BUNDLE, "bundle without the full weights", required=True)
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="folder for the full bundle (default: where the service looks for it)"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="pretrained weights, if not found automatically")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune merge``: write the full bundle."""
    from finetune.export.full_bundle import merge_bundle, open_full_bundle  # slow to import

    bundle = open_bundle(args.bundle)
    if not bundle.lacks_weights:
        raise BundleError(f"The bundle {args.bundle} is already a full bundle. Use it without merging.")
    if args.out is None:
        merged = open_full_bundle(args.bundle, weights=args.weights, needs_weights=True)
    elif args.out.exists() and any(args.out.iterdir()):
        raise BundleError(f"{args.out} is not empty. Choose a new folder for the full bundle.")
    else:
        merged = merge_bundle(bundle, args.out, weights=args.weights)
    print(f"bundle       {merged.path} (version {merged.version})")
    return 0
