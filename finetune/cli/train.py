"""``finetune train``: read the settings, download a built-in dataset if requested, train and print the results."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from pathlib import Path

from finetune import config as settings
from finetune.cli.arguments import DATA, add_folder
from finetune.io.progress import events_to, step
from models.artifacts.bundle import Bundle
from models.artifacts.data_folder import TEST, VALID, split_of
from models.errors import RunError
from models.runtime.allocator import return_large_blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, DATA, "folder with train/CLASS/*.jpg and valid/CLASS/*.jpg (default: data)")
    settings.add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output-dir")
    parser.add_argument("--progress-file", type=Path, metavar="FILE", help="append the progress to FILE, as lines of JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune train``. With ``--resume``, settings that are not given are those of the run."""
    return_large_blocks()
    is_main_process = int(os.environ.get("RANK", "0")) == 0  # known before torch is imported
    with events_to(args.progress_file if is_main_process else None):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    if args.resume:
        explicit = settings.explicit_settings(args)
        if explicit.get("output_dir") is None:
            raise RunError("--resume requires the run directory. Add --output-dir runs/NAME.")
        with step("Loading PyTorch"):
            from finetune.training.run_directory import resumed_config

        config = resumed_config(explicit)
    else:
        config = settings.from_arguments(args)
    with step("Loading PyTorch and other libraries"):  # takes seconds; report flag errors first
        from finetune.compute import distributed
        from finetune.data.builtin_datasets import with_data_dir
        from finetune.pipeline import train

    bundle = train(config, resume=args.resume)
    if distributed.is_main_process():
        _print_results(bundle, with_data_dir(config))
    return 0


def _print_results(bundle: Bundle, config: settings.Config) -> None:
    """Print the metrics, the written files and the next two commands."""
    from finetune.metrics.ood_detection import OODLimit
    from finetune.metrics.operating_points import format_operating_points
    from finetune.reports.results import format_results
    from models.runtime.precision import describe_export

    provenance, folder = bundle.manifest["provenance"], bundle.path.parent
    penalty, folds = provenance.get("penalty"), provenance.get("folds")
    if penalty:
        results = f"Results of cross-validation ({folds} folds)" if folds else "Validation results"
        print(f"\nL2 penalty of the logistic head: {penalty:.3g}. {results}:")
    else:
        print(f"\nBest epoch: {provenance['best_epoch']} of {provenance['epochs']}. Validation results:")
    print(format_results(bundle.manifest["metrics"]))
    _print_head_comparison(bundle)
    if points := bundle.manifest.get("operating_points"):
        print("\n".join(["\nThresholds:", *format_operating_points(points, bundle.classes), ""]))
    if ood := bundle.manifest.get("ood"):
        print(OODLimit.from_dict(ood["limit"]).text())
    if int8 := bundle.manifest.get("int8"):
        print(describe_export(int8))
    if provenance["dataset"]["reviews"]:
        print("The reviews corrected labels in both training and validation.")
    if folds:
        print("Each photo was predicted by a head that was fitted without it. The bundle's own head was fitted to all photos.")
    print(f"These photos also selected {'the temperature' if penalty else 'the best epoch and the temperature'}.")
    print("For an unbiased figure, run `finetune evaluate` on other photos.\n")
    print(f"bundle       {bundle.path} (version {bundle.version})")
    print(f"model card   {bundle.path / 'README.md'}")
    print(f"metrics      {folder / 'metrics.json'}")
    print(f"predictions  {folder / 'predictions.csv'}")
    print(f"plots        {folder / 'plots'}")
    print(f"training     {training_time(bundle)}")
    if config.dataset:
        _evaluate_test_split(bundle, config)
    print("\nNext:")
    for command in next_commands(bundle, config.data_dir, config.labels):
        print(f"  {command}")


def _print_head_comparison(bundle: Bundle) -> None:
    """Print the recalls of the plain and the balanced head, if the classes are unequal."""
    from finetune.metrics.head_comparison import format_head_comparison

    balance = bundle.manifest.get("class_balance")
    if not balance or not balance["comparison"]:
        return
    print("\nThe classes are unequal. Recall of the plain and of the balanced head:")
    print("\n".join(format_head_comparison(balance["comparison"])))
    if balance["weights"]:
        print("The bundle contains the balanced head. Train without the options for unequal classes for the plain one.\n")
    else:
        print(
            "The bundle contains the plain head. For the balanced one, add --class-frequencies equal. It finds more photos of "
            "the rare classes, and mistakes more photos of the others for them.\n"
        )


def training_time(bundle: Bundle) -> str:
    """Describe the duration of the training of the head."""
    from finetune.training.run_directory import HISTORY, read_history

    history = read_history(bundle.path.parent / HISTORY)
    seconds = [row["seconds"] for row in history]
    photos = sum(bundle.manifest["provenance"]["dataset"]["photos"]["train"].values())
    epochs = "" if "penalty" in history[-1] else f"{len(seconds)} epoch{'' if len(seconds) == 1 else 's'} of "
    return f"{epochs}{photos:,} photos in {sum(seconds):,.1f} s, including validation"


def next_commands(bundle: Bundle, data_dir: Path, labels: str | None = None) -> list[str]:
    """Return the commands to evaluate and to serve the bundle.

    The evaluation is on the test split of the data if validation used another one, else by cross-validation if the bundle
    has frozen features, else on the validation photos.
    """
    path, data = shlex.quote(str(bundle.path)), shlex.quote(str(data_dir))
    saved = bundle.manifest["provenance"]["config"]
    table = f" --labels {shlex.quote(labels)}" if labels else ""
    if _has_unused_test_split(bundle, data_dir, labels):
        how = " --split test"
    elif bundle.manifest["base"] is not None and not saved["unfreeze"] and not saved["augment"]:
        how = " --folds 5"
    else:
        how = ""
    return [
        f"finetune evaluate {path} --data-dir {data}{table}{how}",
        f"DATA_DIR={data} serve-classifier {path}",
    ]


def _has_unused_test_split(bundle: Bundle, data_dir: Path, labels: str | None) -> bool:
    if labels:
        return bool((bundle.manifest["provenance"]["dataset"].get("labels") or {}).get("has_test_split"))
    splits = {split_of(folder.name) for folder in data_dir.iterdir() if folder.is_dir()} if data_dir.is_dir() else set()
    return {TEST, VALID} <= splits


def _evaluate_test_split(bundle: Bundle, config: settings.Config) -> None:
    """Evaluate a finished run on its dataset's test split into ``test`` next to the bundle, unless already done."""
    from finetune.evaluation.evaluate import evaluate_bundle

    out = bundle.path.parent / TEST
    if (out / "metrics.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)  # left by an interrupted evaluation
    evaluation = evaluate_bundle(bundle.path, config.data_dir, split=TEST, out=out, workers=config.workers, seed=config.seed)
    print("\nTest results, on images that were not used in training:")
    print(f"{evaluation.summary()}\nresults      {out}")
