"""``finetune threshold``: show the thresholds of a bundle, or write a version of it with others. Nothing is trained."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from models.artifacts.bundle import Bundle, open_bundle
from models.errors import BundleError, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle, which does not change")
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--target-precision",
        metavar="X|CLASS=X,...",
        help="precision to keep for all classes, or by class, such as 0.99 or dogs=0.99,cats=0.95",
    )
    change.add_argument("--clear", action="store_true", help="remove the thresholds")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="results of `finetune evaluate` on photos that were not used in training, such as with --folds",
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="folder of the new bundle (default: BUNDLE-thresholds)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune threshold``: print the thresholds, or write a bundle with new ones and print these."""
    bundle = open_bundle(args.bundle, files=())
    if args.target_precision is None and not args.clear:
        if args.evaluation or args.output_dir:
            raise ConfigError("--evaluation and --output-dir require --target-precision or --clear. Add one, or remove them.")
        _print_thresholds(bundle)
        return 0
    from finetune.evaluation.held_out import read_evaluation, read_held_out  # slow to import
    from finetune.evaluation.thresholds import write_thresholds
    from finetune.metrics.operating_points import parse_targets

    targets = {} if args.clear else parse_targets(args.target_precision, bundle.classes)
    held_out = read_evaluation(args.evaluation, bundle) if args.evaluation else None
    if held_out is None:
        with contextlib.suppress(BundleError) if args.clear else contextlib.nullcontext():
            held_out = read_held_out(bundle)
    path = bundle.path.resolve()
    out = args.output_dir or path.with_name(f"{path.name}-thresholds")
    changed = write_thresholds(bundle, held_out, targets, out)
    _print_thresholds(changed)
    print(f"bundle       {changed.path} (version {changed.version})")
    return 0


def _print_thresholds(bundle: Bundle) -> None:
    from finetune.metrics.operating_points import format_operating_points  # slow to import

    points = bundle.manifest.get("operating_points")
    if points and points["classes"]:
        print("\n".join(format_operating_points(points)))
        return
    required = bundle.decision_rule.min_probability
    for name, probability in required.items():
        print(f"{name}: a probability of at least {probability:.4f} is required.")
    if not required:
        print(f"{bundle.path} has no thresholds. Every photo gets its most probable class.")
