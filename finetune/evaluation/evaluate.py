"""Evaluate a bundle on labeled images with its serving graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.batch_inference.predict import BATCH
from finetune.data.apply_reviews import EXCLUSION_REASONS, ReviewTable, apply_reviews
from finetune.data.embeddings import build_similarity_index
from finetune.data.image_files import ImageSearch, describe_skipped, find_images
from finetune.data.image_folder import NO_LABEL, Dataset, Sample, read_split
from finetune.data.inspection import BatchingConsumer, ImageRecord, fingerprint_context, inspect_images, table_columns
from finetune.evaluation.fit_ood import neither_folder
from finetune.export.full_bundle import open_full_bundle
from finetune.io.array_store import ArrayStore
from finetune.io.output_folder import require_empty_folder
from finetune.io.terminal import escape_controls
from finetune.reports.results import format_results, write_results
from models.artifacts.bundle import GRAPH, Bundle
from models.artifacts.evaluation import EVALUATED, write_evaluation
from models.artifacts.paths import default_cache_dir
from models.artifacts.predictions import Predictions
from models.artifacts.reviews import NEITHER
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
    """Predicts images while they are inspected: embedding, probabilities, and OOD score if there is one, by sha256."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(BATCH)
        self._engine = OpenVINOEngine(bundle.path / GRAPH, outputs=["embedding", *bundle.engine_outputs])
        self.results: dict[str, tuple[NDArray[np.float32], ...]] = {}

    def column(self, records: Sequence[ImageRecord], output: int) -> NDArray[np.float32]:
        """Return one of the outputs for inspected images, in order: (N, ...)."""
        return np.stack([self.results[record.sha256][output] for record in records])

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
    reviews: ReviewTable | None = None,
    neither: Sequence[Path] = (),
    workers: int = 0,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Evaluation:
    """Evaluate a bundle and write metrics, predictions, similar images, plots and evaluation.json to ``out``.

    Unreadable images are skipped and reported. If there is a folder ``none`` or ``neither`` next to the class folders, its
    images measure how many images of none of the classes the bundle recognizes.

    Args:
        bundle_dir: The bundle to evaluate.
        data_dir: The folder of labeled images.
        label_table: Table of the labels.
        split: The subfolder of ``data_dir``, or the split of the table, to evaluate. None: valid, or all images of a table
            without splits.
        out: A new or empty folder for the results. None: ``default_output_dir``.
        reviews: Reviewed labels to apply. Images that a reviewer marked as none of the classes count like those of ``neither``.
        neither: Further folders of images of none of the classes.
        workers: Number of decoding threads. 0: one per CPU.
        seed: Seed of the bootstrap and of the random sheets.
        cache_dir: Folder of the fingerprint cache.

    Raises:
        BundleError: The bundle cannot be opened.
        DataError: The dataset does not match the bundle, or none of its images can be read.
    """
    bundle = open_full_bundle(bundle_dir)
    listed = read_split(data_dir, split, bundle.classes, labels=label_table)
    split = listed.samples[0].split
    for line in describe_skipped(listed.skipped, data_dir):
        print(f"Note: {line}")
    out = out or default_output_dir(bundle_dir, data_dir, split)
    require_empty_folder(out)
    store = ArrayStore(cache_dir or default_cache_dir(), fingerprint_context(bundle.preprocessing.decode_px), limit_mb=4096)
    none_of_these = _list_neither(listed.neither, neither, split, label_table)
    samples = [*listed.samples, *(sample for _, sample in none_of_these)]
    print(f"Inspecting and predicting {len(samples):,} photos ...")
    predictor = _Predictor(bundle)
    records = inspect_images(samples, store=store, preprocessing=bundle.preprocessing, consumer=predictor, workers=workers)
    for record in records:
        if record.error:
            print(escape_controls(f"Skipped: {record.sample.path}: {record.error}"))
    readable = [record for record in records if record.error is None and record.sample.label != NO_LABEL]
    others: dict[str, list[ImageRecord]] = {}
    for (folder, _), record in zip(none_of_these, records[len(listed.samples) :], strict=True):
        if record.error is None:
            others.setdefault(folder, []).append(record)
    if reviews:
        readable, excluded = _apply_reviews(reviews, bundle, data_dir, readable)
        if excluded:
            others["reviews"] = excluded
    if not readable:
        raise DataError(
            f"None of the {len(listed.samples)} photos in {data_dir} can be read. Run `finetune audit {data_dir}` for details."
        )
    probabilities = predictor.column(readable, 1).astype(np.float64)
    predictions = Predictions(
        classes=bundle.classes,
        image_names=tuple(s.sample.name for s in readable),
        labels=np.array([s.sample.label for s in readable], dtype=np.int64),
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        splits=tuple(s.sample.split for s in readable),
        sha256s=tuple(s.sha256 for s in readable),
        **table_columns(readable),
        ood_scores=predictor.column(readable, 2) if bundle.has_ood_score else None,
    )
    temperature = float(bundle.manifest["temperature"])
    raw = np.power(predictions.probabilities, temperature)  # softmax(z / T) ** T is softmax(z) before normalization
    embeddings = predictor.column(readable, 0)
    metrics = write_results(
        out,
        predictions,
        similarity=build_similarity_index(predictions.sha256s, embeddings, readable, bundle.classes),
        uncalibrated=raw / raw.sum(axis=1, keepdims=True),
        temperature=temperature,
        data_dir=data_dir,
        rule=bundle.decision_rule,
        neither_scores={name: predictor.column(own, 2) for name, own in others.items()} if bundle.has_ood_score else None,
        seed=seed,
    )
    write_evaluation(out, bundle, kind=EVALUATED, classes=bundle.classes, split=split, temperature=temperature)
    return Evaluation(out, predictions, metrics)


def _list_neither(
    listed: Sequence[Sample], folders: Sequence[Path], split: str, label_table: Path | None
) -> list[tuple[str, Sample]]:
    """List images of none of the classes, each with the name of its folder.

    Args:
        listed: Images that the dataset itself names as such.
        folders: Further folders of such images.
        split: The split to record.
        label_table: Table of the labels.

    Raises:
        DataError: A folder does not exist or has no images.
    """
    samples = [(neither_folder(sample.name, label_table), sample) for sample in listed]
    search = ImageSearch()
    for folder in folders:
        found = find_images([folder], search)
        samples += [(folder.as_posix(), Sample(path.as_posix(), path, NO_LABEL, split)) for path in found]
    for line in describe_skipped(search.skipped):
        print(f"Note: {line}")
    return samples


def _apply_reviews(
    reviews: ReviewTable, bundle: Bundle, data_dir: Path, records: Sequence[ImageRecord]
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Apply reviews to the images. Returns the remaining ones, and the ones that are none of the classes."""
    dataset = Dataset(data_dir, bundle.classes, tuple(record.sample for record in records), {}, {})
    _, remaining, summary = apply_reviews(reviews, dataset, records)
    print(summary.text())
    reason = EXCLUSION_REASONS[NEITHER]
    return remaining, [record for record in records if summary.excluded.get(record.sample.name) == reason]
