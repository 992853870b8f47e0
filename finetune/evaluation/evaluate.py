"""Evaluate a bundle on labeled images with its serving graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.batch_inference.predict import BATCH
from finetune.data.embeddings import build_similarity_index
from finetune.data.image_files import describe_skipped
from finetune.data.image_folder import read_split
from finetune.data.inspection import BatchingConsumer, fingerprint_context, inspect_images, table_columns
from finetune.export.merge_head import open_full_bundle
from finetune.io.array_store import ArrayStore
from finetune.io.output_folder import require_empty_folder
from finetune.reports.results import format_results, write_results
from models.artifacts.bundle import GRAPH, Bundle
from models.artifacts.evaluation import EVALUATED, write_evaluation
from models.artifacts.paths import default_cache_dir
from models.artifacts.predictions import Predictions
from models.errors import DataError
from models.runtime.openvino_engine import OpenVINOEngine


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        path: The folder of the written files.
        predictions: A row per image.
        metrics: The metrics with their 95% intervals, as written to metrics.json.
    """

    path: Path
    predictions: Predictions
    metrics: dict[str, Any]

    def summary(self) -> str:
        """Format the metrics as a short text."""
        return format_results(self.metrics)


def default_output_dir(bundle_dir: Path, data_dir: Path, name: str) -> Path:
    """Return evaluations/BUNDLE-DATA-NAME. The name of a bundle in a run directory is that of the run."""
    bundle_name = bundle_dir.resolve().parent.name if bundle_dir.name == "bundle" else bundle_dir.name
    return Path("evaluations") / f"{bundle_name}-{data_dir.resolve().name}-{name}"


class _Predictor(BatchingConsumer):
    """Predicts images while they are inspected: probabilities (classes,) and embedding (d,) by sha256."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(BATCH)
        self._engine = OpenVINOEngine(bundle.path / GRAPH, outputs=["probabilities", "embedding"])
        self.results: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def has_result(self, sha256: str) -> bool:
        return sha256 in self.results

    def process(self, sha256s: Sequence[str], pixels: NDArray[np.uint8]) -> None:
        rows = zip(*self._engine.run(pixels), strict=True)
        self.results.update(zip(sha256s, rows, strict=True))

    def flush(self) -> None:
        """Do nothing, as the results stay in memory."""


def evaluate_bundle(
    bundle_dir: Path,
    data_dir: Path,
    *,
    label_table: Path | None = None,
    split: str | None = None,
    out: Path | None = None,
    workers: int = 0,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Evaluation:
    """Evaluate a bundle and write metrics, predictions, similar images, plots and evaluation.json to ``out``.

    Unreadable images are skipped and reported.

    Args:
        bundle_dir: The bundle to evaluate.
        data_dir: The folder of labeled images.
        label_table: Table of the labels.
        split: The subfolder of ``data_dir``, or the split of the table, to evaluate. None: valid, or all images of a table
            without splits.
        out: A new or empty folder for the results. None: ``default_output_dir``.
        workers: Number of decoding threads. 0: one per CPU.
        seed: Seed of the bootstrap and of the random sheets.
        cache_dir: Folder of the fingerprint cache.

    Raises:
        BundleError: The bundle cannot be opened.
        DataError: The data set does not match the bundle, or none of its images can be read.
    """
    bundle = open_full_bundle(bundle_dir)
    samples, skipped = read_split(data_dir, split, bundle.classes, labels=label_table)
    split = samples[0].split
    for line in describe_skipped(skipped, data_dir):
        print(f"Note: {line}")
    out = out or default_output_dir(bundle_dir, data_dir, split)
    require_empty_folder(out)
    store = ArrayStore(cache_dir or default_cache_dir(), fingerprint_context(bundle.preprocessing.decode_px), limit_mb=4096)
    print(f"Inspecting and predicting {len(samples):,} photos ...")
    predictor = _Predictor(bundle)
    records = inspect_images(samples, store=store, preprocessing=bundle.preprocessing, consumer=predictor, workers=workers)
    for record in records:
        if record.error:
            print(f"Skipped: {record.sample.path}: {record.error}")
    readable = [(s, *predictor.results[s.sha256]) for s in records if s.error is None]
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
        **table_columns([s for s, _, _ in readable]),
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
    return Evaluation(out, predictions, metrics)
