"""Evaluate a bundle on labeled images with its serving graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune.batch_inference.predict import classify
from finetune.data.embeddings import build_similarity_index
from finetune.data.image_files import describe_skipped
from finetune.data.image_folder import read_split
from finetune.data.inspection import PixelCache, fingerprint_context, inspect_images
from finetune.export.merge_head import open_full_bundle
from finetune.io.array_store import ArrayStore
from finetune.io.output_folder import require_empty_folder
from finetune.reports.results import write_results
from models.artifacts.evaluation import EVALUATED, write_evaluation
from models.artifacts.paths import default_cache_dir
from models.artifacts.predictions import Predictions
from models.errors import DataError

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
    samples, skipped = read_split(data_dir, split, bundle.classes)
    for line in describe_skipped(skipped, data_dir):
        print(f"Note: {line}")
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
