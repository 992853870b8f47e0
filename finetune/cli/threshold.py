"""``finetune threshold``: show the decision rule of a bundle, or write a version of it with another one. Nothing is trained."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.arguments import BUNDLE, add_folder
from finetune.config import Config
from models.artifacts.bundle import Bundle, open_bundle
from models.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from finetune.evaluation.held_out import HeldOutPredictions
    from finetune.evaluation.thresholds import LimitChange


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, BUNDLE, "bundle, which does not change", required=True)
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--target-precision",
        metavar="X|CLASS=X,...",
        help="precision to keep, for all classes (0.99) or by class (dogs=0.99,cats=0.95). Classes that are not named keep "
        "their target; dogs=none removes one",
    )
    change.add_argument("--clear", action="store_true", help="remove the thresholds of all classes")
    parser.add_argument(
        "--false-alarms",
        type=float,
        metavar="X",
        help="fraction of photos of the classes that may count as unlike the training photos; sets the limit of the OOD score",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="results of `finetune evaluate` on photos that were not used in training, such as with --folds, to select from "
        "instead of the bundle's own out-of-fold results",
    )
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="folder of the new bundle (default: BUNDLE-thresholds)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune threshold``: print the decision rule, or write a bundle with a new one and print that."""
    bundle = open_bundle(args.bundle, files=())
    if args.target_precision is None and args.false_alarms is None and not args.clear:
        if args.evaluation or args.output_dir:
            raise ConfigError(
                "--evaluation and --output-dir require --target-precision, --false-alarms or --clear. Add one, or remove them."
            )
        _print_rule(bundle)
        return 0
    from finetune.evaluation.held_out import read_evaluation, read_held_out  # slow to import
    from finetune.evaluation.thresholds import write_thresholds

    targets = _targets(args, bundle)
    evaluation = read_evaluation(args.evaluation, bundle) if args.evaluation else None
    ood = None if args.false_alarms is None else _choose_limit(bundle, evaluation, args.false_alarms)
    held_out = evaluation
    if held_out is None and targets is not None:
        with contextlib.nullcontext() if targets else contextlib.suppress(BundleError):
            held_out = read_held_out(bundle)
    path = bundle.path.resolve()
    out = args.output_dir or path.with_name(f"{path.name}-thresholds")
    changed = write_thresholds(bundle, held_out, targets, out, ood=ood)
    _print_rule(changed)
    print(f"bundle       {changed.path} (version {changed.version})")
    return 0


def _targets(args: argparse.Namespace, bundle: Bundle) -> dict[str, float] | None:
    """Return the target of each class that has one in the new rule, or None if the thresholds do not change."""
    from finetune.evaluation.thresholds import current_targets
    from finetune.metrics.operating_points import parse_targets

    if args.clear:
        return {}
    if args.target_precision is None:
        return None
    targets = {**current_targets(bundle), **parse_targets(args.target_precision, bundle.classes)}
    return {name: target for name in bundle.classes if (target := targets.get(name)) is not None}


def _choose_limit(bundle: Bundle, evaluation: HeldOutPredictions | None, false_alarms: float) -> LimitChange:
    """Choose the limit of the OOD score from an evaluation, or from the bundle's own out-of-fold scores.

    Raises:
        BundleError: The bundle or the evaluation has no scores.
        ConfigError: The rate is out of range.
    """
    from finetune.evaluation.held_out import read_ood_scores
    from finetune.evaluation.thresholds import LimitChange
    from finetune.metrics.ood_detection import fit_limit

    Config(false_alarms=false_alarms)  # checks the range
    if not bundle.has_ood_score:
        raise BundleError(f"The bundle {bundle.path} has no OOD score. Train it again to get one.")
    limit = bundle.manifest["ood"]["limit"]
    if evaluation is None:
        stored = read_ood_scores(bundle)
        scores, groups, source = stored.in_distribution, stored.groups, limit["source"]
    elif evaluation.ood_scores is not None:
        scores, groups, source = evaluation.ood_scores, evaluation.groups, evaluation.ood_source
    else:
        raise BundleError("The evaluation has no OOD scores. Run `finetune evaluate` again.")
    return LimitChange(fit_limit(scores, false_alarms, sample=limit["sample"], groups=groups), source)


def _print_rule(bundle: Bundle) -> None:
    """Print the complete decision rule: the limit of the OOD score, and the threshold of each class."""
    from finetune.metrics.ood_detection import OODLimit  # slow to import
    from finetune.metrics.operating_points import format_operating_points

    rule, ood, points = bundle.decision_rule, bundle.manifest.get("ood"), bundle.manifest.get("operating_points")
    if rule.max_ood_score is None:
        print("The bundle has no limit of the OOD score, so photos that are unlike the training photos get a label as well.")
    elif ood:
        limit = OODLimit.from_dict(ood["limit"])
        print(f"A photo with an OOD score above {rule.max_ood_score:.4f} gets no label. {limit.text()}")
    if points and points["classes"]:
        print("\n".join(format_operating_points(points, bundle.classes)))
    else:
        print("No class has a threshold.")
