"""Evaluate a bundle on labeled images with its serving graph: ``finetune evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from finetune.batch_inference.predict import classify
from finetune.data.embeddings import build_similarity_index
from finetune.data.image_folder import read_split
from finetune.data.inspection import PixelCache, fingerprint_context, inspect_images
from finetune.export.merge_head import open_full_bundle
from finetune.io.array_store import ArrayStore
from finetune.io.output_folder import require_empty_folder
from finetune.metrics.classification import format_summary
from finetune.reports.results import write_results
from models.artifacts.evaluation import EVALUATED, write_evaluation
from models.artifacts.label_issues import rank_label_issues, suggested_labels
from models.artifacts.paths import default_cache_dir
from models.artifacts.predictions import Predictions
from models.errors import ConfigError, DataError

MAX_SHOWN = 10


def evaluate_bundle(
    bundle_dir: Path,
    data_dir: Path,
    *,
    split: str = "valid",
    out: Path,
    workers: int = 0,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a bundle and write metrics, predictions, similar images, plots and evaluation.json to ``out``.

    Unreadable images are skipped and reported.

    Args:
        bundle_dir: The bundle to evaluate.
        data_dir: The folder of labeled images.
        split: The subfolder of ``data_dir`` to evaluate.
        out: A new or empty folder for the results.
        workers: Number of decoding threads. 0: one per CPU.
        seed: Seed of the bootstrap and of the random sheets.
        cache_dir: Folder of the fingerprint cache.

    Returns:
        The metrics, as written to metrics.json.

    Raises:
        BundleError: The bundle cannot be opened.
        DataError: The data set does not match the bundle, or none of its images can be read.
    """
    bundle = open_full_bundle(bundle_dir)
    samples = read_split(data_dir, split, bundle.classes)
    require_empty_folder(out)
    pixel_cache = PixelCache(bundle.preprocessing, limit_mb=0)
    store = ArrayStore(
        cache_dir or default_cache_dir(), fingerprint_context(pixel_cache.preprocessing.decode_px), limit_mb=4096
    )
    records = inspect_images(samples, store=store, pixel_cache=pixel_cache, workers=workers)
    results = list(classify(bundle, [sample.path for sample in samples], workers=workers))
    for result in results:
        if result.error:
            print(f"Skipped: {result.path}: {result.error}")
    readable = [
        (s, r.probabilities, r.embedding)
        for s, r in zip(records, results, strict=True)
        if r.probabilities is not None and r.embedding is not None
    ]
    if not readable:
        raise DataError(
            f"None of the {len(samples)} photos in {data_dir} can be read. Run `finetune audit {data_dir}` for details."
        )
    probabilities = np.stack([row for _, row, _ in readable]).astype(np.float64)
    predictions = Predictions(
        classes=bundle.classes,
        image_names=tuple(s.sample.name for s, _, _ in readable),
        labels=np.array([s.sample.label for s, _, _ in readable], dtype=np.int64),
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        splits=tuple(s.sample.split for s, _, _ in readable),
        sha256s=tuple(s.sha256 for s, _, _ in readable),
    )
    temperature = float(bundle.manifest["temperature"])
    raw = np.power(predictions.probabilities, temperature)  # softmax(z / T) ** T is softmax(z) before normalization
    embeddings = np.stack([row for _, _, row in readable])
    metrics = write_results(
        out,
        predictions,
        similarity=build_similarity_index(predictions.sha256s, embeddings, [s for s, _, _ in readable], bundle.classes),
        uncalibrated=raw / raw.sum(axis=1, keepdims=True),
        temperature=temperature,
        data_dir=data_dir,
        seed=seed,
    )
    write_evaluation(out, bundle, kind=EVALUATED, classes=bundle.classes, split=split, temperature=temperature)
    return metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="bundle to evaluate")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DATA", help="folder of labeled photos")
    parser.add_argument("--split", help="subfolder of DATA to evaluate (default: valid)")
    parser.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help="cross-validate instead: predict all photos of train and valid out of fold, with N folds",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="with --folds: pretrained weights, if not found automatically"
    )
    parser.add_argument(
        "--reviews", type=Path, metavar="FILE", help="with --folds: reviewed labels from the gallery (reviews.csv)"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="OUT", help="folder for the results (default: evaluations/BUNDLE-DATA-SPLIT)"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="PATH", help="cache folder (default: ~/.cache/finetune)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="number of decoding threads (default: one per CPU)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune evaluate``: write the results and print a summary."""
    bundle_name = args.bundle.resolve().parent.name if args.bundle.name == "bundle" else args.bundle.name
    name = f"{args.folds}-folds" if args.folds else args.split or "valid"
    out = args.output_dir or Path("evaluations") / f"{bundle_name}-{args.data_dir.resolve().name}-{name}"
    if args.folds is not None:
        _run_folds(args, out)
    elif args.weights or args.reviews:
        raise ConfigError("--weights and --reviews require --folds. Set the number of folds, or remove them.")
    else:
        metrics = evaluate_bundle(
            args.bundle, args.data_dir, split=args.split or "valid", out=out, workers=args.workers, cache_dir=args.cache_dir
        )
        print(format_summary(metrics))
    print(f"\nresults      {out}")
    return 0


def _run_folds(args: argparse.Namespace, out: Path) -> None:
    from finetune.data.review_source import read_review_file
    from finetune.evaluation.cross_validation import cross_validate

    if args.folds < 2 or args.split:
        raise ConfigError("--folds must be at least 2, and cannot be combined with --split: it covers training and validation.")
    predictions, metrics = cross_validate(
        args.bundle,
        args.data_dir,
        folds=args.folds,
        out=out,
        weights=args.weights,
        reviews=read_review_file(args.reviews) if args.reviews else None,
        workers=args.workers,
        cache_dir=args.cache_dir,
    )
    print(format_summary(metrics))
    issues, suggested = rank_label_issues(predictions), suggested_labels(predictions)
    print(f"\nPossible label errors (out-of-fold): {len(issues):,} of {len(predictions.image_names):,} photos")
    for row in issues[:MAX_SHOWN]:
        label, other = (predictions.classes[i] for i in (predictions.labels[row], suggested[row]))
        print(f"  {predictions.image_names[row]}: {label}, looks like {other}")
    if len(issues) > MAX_SHOWN:
        print(f"  ... and {len(issues) - MAX_SHOWN:,} more, shown in the gallery")
