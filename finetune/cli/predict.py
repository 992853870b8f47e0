"""``finetune predict``: classify photos with a bundle. Never imports torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from finetune.batch_inference.predict import ImagePrediction, classify, list_images
from finetune.data.image_files import ImageSearch, describe_skipped, find_images, is_failure
from finetune.data.label_source import locate_data
from finetune.data.label_table import LabelTable, read_label_table
from finetune.export.full_bundle import open_full_bundle
from finetune.io.terminal import escape_controls
from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.decision_rule import Decision, format_probability
from models.artifacts.paths import resolve_bundle
from models.artifacts.text_table import csv_writer
from models.errors import ConfigError
from models.runtime.openvino_engine import supports_bf16
from models.runtime.precision import select_precision

DECISION_COLUMNS = ["in_distribution", "ood_score", "because", "because_code"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="bundle to predict with")
    parser.add_argument("photos", type=Path, nargs="*", metavar="PHOTO_OR_FOLDER", help="photos or folders to classify")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="number of decoding threads (default: one per CPU)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per line")
    output.add_argument("--csv", action="store_true", help="print CSV with a column per class")
    output.add_argument(
        "--output",
        type=Path,
        metavar="SCORES.parquet",
        help="write a folder of Parquet files, for any number of photos; already scored photos are skipped",
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="with --output: file with one path per line (-: standard input)"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="table of labels that lists the photos; --output adds its columns to the scores",
    )
    parser.add_argument(
        "--images-per-file", type=int, default=4096, metavar="N", help="photos per Parquet file (default: 4096)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "int8", "auto"),
        default="fp32",
        help="numeric precision of the network (default: fp32)",
    )
    parser.add_argument(
        "--no-abstain",
        dest="abstain",
        action="store_false",
        help="give every photo its most probable class as its label, also if it is unlike the training photos or below a "
        "threshold; the reason against it is still shown",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``finetune predict``: print a prediction for each photo. Returns 1 if a photo could not be read."""
    if args.output:
        return run_scoring(args)
    if bool(args.photos) == bool(args.labels) or args.list or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "Pass photos or folders to classify, or --labels. --list and multiple processes require --output SCORES.parquet."
        )
    bundle = open_full_bundle(args.bundle)
    search = ImageSearch()
    labels = _read_labels(args)
    images = labels.image_paths if labels else list(find_images(args.photos, search))
    failed = _print_skipped(search)
    predictions = classify(bundle, images, precision=_precision(args, bundle), workers=args.workers)
    table = csv_writer(sys.stdout)
    if args.csv:
        probabilities = [f"p_{name}" for name in bundle.classes]
        table.writerow(["file", "label", "confidence", *probabilities, *DECISION_COLUMNS, "error"])
    for prediction in predictions:
        failed = failed or prediction.error is not None
        if args.json:
            print(json.dumps(_as_dict(prediction, bundle, args.abstain), ensure_ascii=False))
        elif args.csv:
            table.writerow(_as_row(prediction, bundle, args.abstain))
        else:
            print(escape_controls(_as_line(prediction, bundle, args.abstain)))
    return 1 if failed else 0


def run_scoring(args: argparse.Namespace) -> int:
    """Run ``finetune predict --output``: score the chunks of this process (RANK of WORLD_SIZE) into Parquet files."""
    from finetune.batch_inference.parquet import score_to_parquet

    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if sum(map(bool, (args.photos, args.list, args.labels))) != 1:
        raise ConfigError("--output requires either photos and folders, a --list or --labels.")
    if args.images_per_file < 1:
        raise ConfigError(f"--images-per-file must be at least 1 (got {args.images_per_file}).")
    if world_size > 1 and args.list == Path("-"):
        raise ConfigError("Only one process can read standard input. Write the list to a file that all processes can read.")
    bundle = open_full_bundle(args.bundle) if world_size == 1 else open_bundle(resolve_bundle(args.bundle))
    search = ImageSearch()
    labels = _read_labels(args)
    counts = score_to_parquet(
        bundle,
        labels.image_paths if labels else list_images(args.photos, args.list, search),
        args.output,
        images_per_file=args.images_per_file,
        precision=_precision(args, bundle),
        abstain=args.abstain,
        labels=labels,
        workers=args.workers,
        rank=rank,
        world_size=world_size,
    )
    prefix = f"process {rank + 1} of {world_size}: " if world_size > 1 else ""
    rate = counts.scored / counts.seconds
    print(f"{prefix}{counts.scored:,} photos scored ({rate:,.1f} per second), {counts.skipped:,} already scored")
    if counts.unreadable:
        print(f"{prefix}{counts.unreadable:,} of them could not be read (see column `error`)")
    if counts.complete:
        print(f"{args.output} is complete.")
    return 1 if _print_skipped(search) else 0


def _read_labels(args: argparse.Namespace) -> LabelTable | None:
    if args.labels is None:
        return None
    root, path = locate_data(None, args.labels)
    return read_label_table(path, root) if path else None


def _print_skipped(search: ImageSearch) -> bool:
    """Print what was skipped to standard error. Returns whether something could not be read."""
    for line in describe_skipped(search.skipped):
        print(f"Note: {line}", file=sys.stderr)
    return any(is_failure(entry.reason) for entry in search.skipped)


def _precision(args: argparse.Namespace, bundle: Bundle) -> str:
    if args.precision == "int8" and not bundle.has_int8:
        raise ConfigError(f"{bundle.path} has no graph in int8. Remove --precision, or use --precision fp32.")
    if args.precision == "bf16" and not supports_bf16():
        raise ConfigError("This processor does not support bf16. Remove --precision, or use --precision fp32.")
    return select_precision(bundle, args.precision).name


def _decide(prediction: ImagePrediction, bundle: Bundle, abstain: bool) -> Decision:
    assert prediction.probabilities is not None
    return bundle.decision_rule.decide(bundle.classes, prediction.probabilities, prediction.ood_score, abstain=abstain)


def _as_dict(prediction: ImagePrediction, bundle: Bundle, abstain: bool) -> dict[str, object]:
    if prediction.probabilities is None:
        return {"file": str(prediction.image), "error": prediction.error}
    decision = _decide(prediction, bundle, abstain)
    return {
        "file": str(prediction.image),
        "label": decision.label,
        "because": decision.because,
        "because_code": decision.because_code,
        "in_distribution": decision.in_distribution,
        "ood_score": prediction.ood_score,
        "confidence": float(prediction.probabilities.max()),
        "probabilities": {name: float(p) for name, p in zip(bundle.classes, prediction.probabilities, strict=True)},
        "model": bundle.name,
        "version": bundle.version,
    }


def _as_row(prediction: ImagePrediction, bundle: Bundle, abstain: bool) -> list[str]:
    if prediction.probabilities is None:
        return [str(prediction.image), *[""] * (2 + len(bundle.classes) + len(DECISION_COLUMNS)), prediction.error or ""]
    decision = _decide(prediction, bundle, abstain)
    in_distribution = "" if decision.in_distribution is None else str(decision.in_distribution).lower()
    score = "" if prediction.ood_score is None else f"{prediction.ood_score:.9g}"
    numbers = [f"{p:.9g}" for p in (prediction.probabilities.max(), *prediction.probabilities)]
    reason = [decision.because or "", decision.because_code or ""]
    return [str(prediction.image), decision.label or "", *numbers, in_distribution, score, *reason, ""]


def _as_line(prediction: ImagePrediction, bundle: Bundle, abstain: bool) -> str:
    if prediction.probabilities is None:
        return f"{prediction.image}: {prediction.error}"
    decision = _decide(prediction, bundle, abstain)
    best = int(prediction.probabilities.argmax())
    most_probable = f"{bundle.classes[best]} ({format_probability(float(prediction.probabilities[best]))})"
    if decision.label is None:
        return f"{prediction.image}: no label, {decision.because}. Most probable: {most_probable}"
    return f"{prediction.image}: {most_probable}" + (f", although {decision.because}" if decision.because else "")
