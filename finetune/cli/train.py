"""``finetune train``: read the settings, download a built-in data set if requested, and train."""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

from finetune import config as settings
from models.artifacts.bundle import Bundle
from models.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output-dir")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune train``. With ``--resume``, settings that are not given are those of the run."""
    if args.resume:
        explicit_settings = settings.explicit_settings(args)
        if "output_dir" not in explicit_settings:
            raise RunError("--resume requires the run directory. Add --output-dir runs/NAME.")
        from finetune.compute import distributed
        from finetune.training import run_directory

        saved = distributed.run_on_main(lambda: run_directory.read_config(Path(explicit_settings["output_dir"])))
        config = settings.from_mapping({**saved, **explicit_settings})
    else:
        config = settings.from_arguments(args)
    from finetune.compute import distributed
    from finetune.pipeline import train  # importing torch takes seconds; report flag errors first

    if config.dataset:
        config = distributed.local_main_first(lambda: _with_dataset(config, resume=args.resume))
    bundle = train(config, resume=args.resume)
    if not distributed.is_main_process():
        return 0
    print(f"speed        {photos_per_second(bundle):,.0f} training photos per second (time includes validation)")
    if config.dataset:
        _evaluate_test_split(bundle, config)
    return 0


def photos_per_second(bundle: Bundle) -> float:
    """Return the training photos per second over all epochs. The time includes validation."""
    with (bundle.path.parent / "history.csv").open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    photos = sum(bundle.manifest["provenance"]["dataset"]["photos"]["train"].values())
    return float(photos * len(seconds) / sum(seconds))


def _evaluate_test_split(bundle: Bundle, config: settings.Config) -> None:
    """Evaluate a finished run on its data set's test split into ``test`` next to the bundle, unless already done."""
    from finetune.data.builtin_datasets import TEST
    from finetune.evaluation.evaluate import evaluate_bundle
    from finetune.metrics.classification import format_summary

    out = bundle.path.parent / TEST
    if (out / "metrics.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)  # left by an interrupted evaluation
    metrics = evaluate_bundle(bundle.path, config.data_dir, split=TEST, out=out, workers=config.workers, seed=config.seed)
    print("\nTest results, on images that were not used in training:")
    print(f"{format_summary(metrics)}\nresults      {out}")


def _with_dataset(config: settings.Config, *, resume: bool) -> settings.Config:
    """Prepare ``--dataset``. Check the network and the run directory first, as the download may be large."""
    from finetune.data import builtin_datasets
    from finetune.pipeline import default_run_dir
    from finetune.training import run_directory
    from models.networks.registry import get_spec

    get_spec(config.backbone)
    config = builtin_datasets.with_data_dir(config)
    if not resume:
        run_directory.require_no_run(config.output_dir or default_run_dir(config))
    assert config.dataset is not None
    builtin_datasets.make_dataset(config.dataset, config.data_dir)
    return config
