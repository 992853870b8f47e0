"""``finetune tune``: compare networks, joins of networks and their heads by cross-validation, and choose presets."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from finetune import config as settings
from finetune.cli.arguments import DATA, add_folder
from finetune.data.label_source import locate_data
from finetune.io.progress import step
from models.artifacts.tuning_result import TUNING_FILE, default_tuning_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, DATA, "folder with train/CLASS/ and valid/CLASS/ (default: that of --labels)")
    parser.add_argument(
        "--backbones",
        metavar="A,B,A+B",
        help="comma-separated networks, joins (A+B), and networks with mirror images (A+flip); default: networks with local "
        "weights, with and without mirror images, and pairs of them",
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="folder for the results (default: runs/DATA-tune)")
    settings.add_flags(parser, settings.SHARED_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Run ``finetune tune``: print the table and write tune.json."""
    with step("Loading PyTorch"):
        from finetune.tuning.tuner import tune

    shared = {key: value for key, value in vars(args).items() if key in settings.SHARED_SETTINGS}
    data_dir, _ = locate_data(args.data_dir, shared.get("labels"))
    out = args.output_dir or default_tuning_dir(data_dir)
    print("\n" + tune(data_dir, args.backbones, out, shared))
    labels = f" --labels {shlex.quote(args.labels)}" if "labels" in args else ""
    tuning = "" if args.output_dir is None else f" --tuning {shlex.quote(str(out / TUNING_FILE))}"
    print(f"Next: finetune train {shlex.quote(str(data_dir))}{labels} --preset best{tuning}")
    return 0
