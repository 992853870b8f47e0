"""``finetune train``: settings from flags and file, then the run."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import config as settings
from models.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir where it was interrupted")


def run(args: argparse.Namespace) -> int:
    """Train. ``--resume`` takes the run's own settings for what is not given."""
    if args.resume:
        given = settings.given(args)
        if "output_dir" not in given:
            raise RunError("--resume needs the run to go on with; name it with --output-dir runs/NAME.")
        from finetune import rundir  # as below

        config = settings.from_mapping({**rundir.read_config(Path(given["output_dir"])), **given})
    else:
        config = settings.from_arguments(args)
    from finetune.run import train  # here, as torch takes seconds to import and a wrong flag should not wait for it

    train(config, resume=args.resume)
    return 0
