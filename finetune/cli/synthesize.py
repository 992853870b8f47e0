"""``finetune synthesize``: draw a labeled dataset of cats and dogs, to try the pipeline without a download."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from finetune.data.synthetic.dataset import write_synthetic_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``finetune synthesize``."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create; must be empty if it exists")
    parser.add_argument(
        "--train", type=int, default=200, metavar="N", help="training images, both classes together (default: %(default)s)"
    )
    parser.add_argument(
        "--valid", type=int, default=80, metavar="N", help="validation images, both classes together (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune synthesize``: write the dataset, then print a summary and the next command."""
    print(f"Drawing {args.train + args.valid:,} images ...", flush=True)
    summary = write_synthetic_dataset(args.out, train=args.train, valid=args.valid, seed=args.seed)
    print(f"Drew {summary.train} training and {summary.valid} validation images of cats and dogs in {summary.out}.")
    print("They are drawings: accuracy on them says nothing about photos.")
    print(f"Next: finetune train {shlex.quote(str(summary.out))} --backbone efficientnet_lite0")
    return 0
