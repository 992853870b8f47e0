"""``finetune compare``: train several networks on the same photos and compare them."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import config as settings
from finetune.cli.arguments import DATA, add_folder
from finetune.data.label_source import locate_data
from finetune.io.progress import step

# Settings that apply to all networks. Unset ones come from each network's recipe.
SHARED_SETTINGS = (
    "head",
    "penalty",
    "normalization",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "lr_schedule",
    "patience",
    "min_delta",
    "class_weights",
    "sampling",
    "class_frequencies",
    "target_precision",
    "augment",
    "permute_pixels",
    "int8",
    "max_accuracy_loss",
    *settings.SHARED_SETTINGS,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, DATA, "folder with train/CLASS/ and valid/CLASS/ (default: that of --labels)")
    parser.add_argument(
        "--backbones",
        required=True,
        metavar="A,B,C",
        help="comma-separated networks; `small`: small built-in networks; `all`: networks with local weights",
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="OUT", help="folder for the runs and the report (default: runs/DATA-compare)"
    )
    settings.add_flags(parser, SHARED_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Run ``finetune compare``: train and benchmark the networks and print the report."""
    with step("Loading PyTorch"):
        from finetune.compare.runner import compare_networks, select_networks

    names = select_networks(args.backbones)
    shared = {key: value for key, value in vars(args).items() if key in SHARED_SETTINGS}
    data_dir, _ = locate_data(args.data_dir, shared.get("labels"))
    out = args.output_dir or Path("runs") / f"{data_dir.resolve().name}-compare"
    compare_networks(data_dir, names, out, shared)
    return 0
