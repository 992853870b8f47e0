"""``finetune audit``: check a folder of photos before training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune.cli.arguments import DATA, add_folder
from finetune.data.image_folder import list_files
from finetune.data.label_source import locate_data
from models.errors import UserError

EXIT_CODES = (
    "Exit code: 0 without problems, 1 if there are problems (notes do not count), 2 if the folder cannot be audited. Training "
    "prints the same findings. It stops at the ones that make its results wrong or a class unusable (photos or groups in both "
    "training and validation, classes that differ between the splits, are empty or too small to hold out a photo, a split "
    "without class folders or readable photos) and continues with all others."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXIT_CODES
    add_folder(parser, DATA, "folder to audit (default: that of --labels)")
    parser.add_argument("--labels", metavar="FILE", help="table of labels, instead of class folders")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    parser.add_argument(
        "--files",
        action="store_true",
        help="instead of an audit, list the photos of each class as JSON",
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=None, help="cache directory for image fingerprints (default: ~/.cache/finetune)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="decoding threads; 0: one per CPU")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune audit``: print the findings. Returns 1 if there are problems (notes do not count), else 0.

    With ``--json``, data that cannot be audited is an object with its ``error``.
    """
    try:
        data_dir, labels = locate_data(args.data_dir, args.labels)
        if args.files:
            print(json.dumps(list_files(data_dir, labels=labels), ensure_ascii=False))
            return 0
        from finetune.data.audit import audit_folder  # slow to import

        report = audit_folder(data_dir, labels=labels, cache_dir=args.cache_dir, workers=args.workers, quiet=args.json)
    except UserError as error:
        if args.json:
            print(json.dumps({"error": str(error)}, indent=2, ensure_ascii=False))
        raise
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if args.json else report.text())
    return 1 if report.problems else 0
