"""``finetune train``: settings from flags and file, then the run."""

from __future__ import annotations

import argparse

from finetune import config as settings
from finetune import rundir
from models.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir where it was interrupted")


def run(args: argparse.Namespace) -> int:
    """Train. ``--resume`` takes the run's own settings for what is not given."""
    if args.resume:
        folder = getattr(args, "output_dir", None)
        if folder is None:
            raise RunError("--resume needs the run to go on with; name it with --output-dir runs/NAME.")
        kept = rundir.read_config(folder)
        given = {key: value for key, value in vars(args).items() if key in kept}
        config = settings.from_mapping({**kept, **given})
    else:
        config = settings.from_arguments(args)
    from finetune.run import train  # here, as torch takes seconds to import and a wrong flag should not wait for it

    train(config, resume=args.resume)
    return 0
