"""``finetune evaluate``: evaluate a bundle on labeled photos, or all photos of a dataset out of fold."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.cli.arguments import BUNDLE, add_folder
from finetune.data.label_source import locate_data
from finetune.evaluation.options import require_compatible_options
from finetune.io.progress import step
from finetune.io.terminal import escape_controls
from models.artifacts.label_issues import can_judge_labels, confusion_matrix, rank_label_issues, suggested_labels
from models.artifacts.predictions import Predictions

MAX_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, BUNDLE, "bundle to evaluate", required=True)
    parser.add_argument("--data-dir", type=Path, metavar="DATA", help="folder of labeled photos (default: that of --labels)")
    parser.add_argument("--labels", metavar="FILE", help="table of labels, instead of class folders")
    parser.add_argument(
        "--split",
        help="subfolder of DATA, or split of the table, to evaluate (default: valid; without splits: all)",
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help="cross-validate instead: predict all photos of train and valid out of fold, with N folds",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="with --folds: pretrained weights, if not found automatically"
    )
    parser.add_argument("--reviews", type=Path, metavar="FILE", help="reviewed labels from the gallery (reviews.csv)")
    parser.add_argument(
        "--neither",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="photos of none of the classes, to measure how many are recognized; repeatable. A folder none or neither next to "
        "the class folders is measured as well",
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="OUT", help="folder for the results (default: evaluations/BUNDLE-DATA-SPLIT)"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="PATH", help="cache folder (default: ~/.cache/finetune)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="number of decoding threads (default: one per CPU)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune evaluate``: write the results and print a summary."""
    require_compatible_options(split=args.split, folds=args.folds, weights=args.weights, neither=args.neither)
    data_dir, labels = locate_data(args.data_dir, args.labels)
    with step("Loading PyTorch"):
        from finetune.data.review_source import read_review_file
        from finetune.evaluation.cross_validation import cross_validate
        from finetune.evaluation.evaluate import evaluate_bundle

    if args.folds:
        evaluation = cross_validate(
            args.bundle,
            data_dir,
            label_table=labels,
            folds=args.folds,
            out=args.output_dir,
            weights=args.weights,
            reviews=read_review_file(args.reviews) if args.reviews else None,
            workers=args.workers,
            cache_dir=args.cache_dir,
        )
    else:
        evaluation = evaluate_bundle(
            args.bundle,
            data_dir,
            label_table=labels,
            split=args.split,
            out=args.output_dir,
            reviews=read_review_file(args.reviews) if args.reviews else None,
            neither=args.neither,
            workers=args.workers,
            cache_dir=args.cache_dir,
        )
    print(evaluation.summary())
    if args.folds:
        _print_label_issues(evaluation.predictions)
    print(f"\nresults      {evaluation.path}")
    return 0


def _print_label_issues(predictions: Predictions) -> None:
    if not can_judge_labels(confusion_matrix(predictions)):
        print("\nPossible label errors: unknown. The accuracy is not significantly better than chance.")
        return
    issues, suggested = rank_label_issues(predictions), suggested_labels(predictions)
    print(f"\nPossible label errors (out-of-fold): {len(issues):,} of {len(predictions.image_names):,} photos")
    for row in issues[:MAX_SHOWN]:
        label, other = (predictions.classes[i] for i in (predictions.labels[row], suggested[row]))
        print(escape_controls(f"  {predictions.image_names[row]}: {label}, looks like {other}"))
    if len(issues) > MAX_SHOWN:
        print(f"  ... and {len(issues) - MAX_SHOWN:,} more, shown in the gallery")
