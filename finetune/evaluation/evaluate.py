"""Measure a bundle on labelled photos, through the graph that is served; no run is needed."""

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
    """Write metrics.json, predictions.csv, what looks alike, plots/ and evaluation.json into ``out``, and give the metrics.

    Photos that cannot be read are left out and named. Raises BundleError and DataError.
    """
    bundle = open_full_bundle(bundle_dir)
    samples = read_split(data_dir, split, bundle.classes)
    require_empty_folder(out)
    pixel_cache = PixelCache(bundle.preprocessing, limit_mb=0)
    store = ArrayStore(
        cache_dir or default_cache_dir(), fingerprint_context(pixel_cache.preprocessing.decode_px), limit_mb=4096
    )
    records = inspect_images(samples, store=store, pixel_cache=pixel_cache, workers=workers)
    answers = list(classify(bundle, [sample.path for sample in samples], workers=workers))
    for answer in answers:
        if answer.error:
            print(f"left out: {answer.path}: {answer.error}")
    good = [
        (s, a.probabilities, a.embedding)
        for s, a in zip(records, answers, strict=True)
        if a.probabilities is not None and a.embedding is not None
    ]
    if not good:
        raise DataError(f"None of the {len(samples)} photos in {data_dir} can be read; `finetune audit {data_dir}` says why.")
    probabilities = np.stack([row for _, row, _ in good]).astype(np.float64)
    predictions = Predictions(
        classes=bundle.classes,
        image_names=tuple(s.sample.name for s, _, _ in good),
        labels=np.array([s.sample.label for s, _, _ in good], dtype=np.int64),
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        splits=tuple(s.sample.split for s, _, _ in good),
        sha256s=tuple(s.sha256 for s, _, _ in good),
    )
    temperature = float(bundle.manifest["temperature"])
    raw = np.power(predictions.probabilities, temperature)  # softmax(z / T) to the power T is softmax(z), but for its sum
    embeddings = np.stack([row for _, _, row in good])
    metrics = write_results(
        out,
        predictions,
        similarity=build_similarity_index(predictions.sha256s, embeddings, [s for s, _, _ in good], bundle.classes),
        uncalibrated=raw / raw.sum(axis=1, keepdims=True),
        temperature=temperature,
        data_dir=data_dir,
        seed=seed,
    )
    write_evaluation(out, bundle, kind=EVALUATED, classes=bundle.classes, split=split, temperature=temperature)
    return metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle to measure")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DATA", help="the folder of labelled photos")
    parser.add_argument("--split", help="which of its folders (default: valid)")
    parser.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help="instead, answer every photo of train and valid by a head trained on the other N - 1 parts of them",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="with --folds: the base's weights, where not found")
    parser.add_argument("--reviews", type=Path, metavar="FILE", help="with --folds: a gallery's decisions on labels")
    parser.add_argument(
        "--output-dir", type=Path, metavar="OUT", help="where the results go (default: evaluations/BUNDLE-DATA-SPLIT)"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="PATH", help="folder of the cache (default: ~/.cache/finetune)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode photos")


def run(args: argparse.Namespace) -> int:
    """``finetune evaluate``: measure, write and print a summary."""
    bundle_name = args.bundle.resolve().parent.name if args.bundle.name == "bundle" else args.bundle.name
    what = f"{args.folds}-folds" if args.folds else args.split or "valid"
    out = args.output_dir or Path("evaluations") / f"{bundle_name}-{args.data_dir.resolve().name}-{what}"
    if args.folds is not None:
        _run_folds(args, out)
    elif args.weights or args.reviews:
        raise ConfigError("--weights and --reviews go with --folds; name the number of folds, or leave them out.")
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
        raise ConfigError("--folds takes 2 or more, and goes over training and validation together; leave --split out.")
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
    named, suggested = rank_label_issues(predictions), suggested_labels(predictions)
    print(f"\nProbably mislabelled, by out-of-fold prediction: {len(named):,} of {len(predictions.image_names):,} photos")
    for row in named[:MAX_SHOWN]:
        label, other = (predictions.classes[i] for i in (predictions.labels[row], suggested[row]))
        print(f"  {predictions.image_names[row]}: {label}, looks like {other}")
    if len(named) > MAX_SHOWN:
        print(f"  ... and {len(named) - MAX_SHOWN:,} more; the gallery shows them")
