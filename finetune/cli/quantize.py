"""``finetune quantize``: write a version of a bundle with a graph in int8. Nothing is trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import config as settings
from finetune.cli.arguments import BUNDLE, add_folder
from models.artifacts.bundle import open_bundle
from models.runtime.precision import describe_export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, BUNDLE, "bundle, which does not change", required=True)
    settings.add_flags(parser, ("data_dir", "labels", "max_accuracy_loss", "workers"))
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="folder of the new bundle (default: BUNDLE-int8)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune quantize``: write a bundle with a graph in int8, or fail if int8 is not accurate enough."""
    bundle = open_bundle(args.bundle)
    config = settings.from_arguments(args)
    from finetune.data.label_source import locate_data
    from finetune.evaluation.quantize_bundle import quantize_bundle  # slow to import

    data_dir, labels = locate_data(config.data_dir, config.labels)
    path = bundle.path.resolve()
    out = args.output_dir or path.with_name(f"{path.name}-int8")
    quantized = quantize_bundle(
        bundle, data_dir, out, labels=labels, max_accuracy_loss=config.max_accuracy_loss, workers=config.workers
    )
    print(describe_export(quantized.manifest["int8"]))
    print(f"bundle       {quantized.path} (version {quantized.version})")
    return 0
