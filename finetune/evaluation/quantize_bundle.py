"""Write a new version of a bundle with a graph in int8. Nothing is trained, and the graph in float32 is the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.image_files import read_image_file
from finetune.data.image_folder import read_dataset
from finetune.data.inspection import read_inspected
from finetune.export.quantization import (
    CALIBRATION_IMAGES,
    QuantizationData,
    add_int8_graph,
    evenly_spaced,
    golden_outputs,
)
from finetune.io.output_folder import require_empty_folder
from finetune.io.threaded_map import threaded_map
from finetune.metrics.calibration import fit_temperature
from finetune.reports.model_card import write_model_card
from models.artifacts.bundle import GOLDEN, GRAPH, INT8_GRAPH, MODEL_CARD, PREDICTIONS, Bundle, write_bundle
from models.artifacts.predictions import Predictions
from models.errors import BundleError, DataError, ImageError


def quantize_bundle(
    bundle: Bundle, data_dir: Path, out: Path, *, labels: Path | None = None, max_accuracy_loss: float, workers: int = 0
) -> Bundle:
    """Copy a bundle to ``out`` with a graph in int8, tested on the bundle's validation images.

    Args:
        bundle: The bundle, which does not change. All of its files were verified.
        data_dir: The data folder that it was trained on.
        out: A new or empty folder.
        labels: Table of the labels, if the bundle was trained with one.
        max_accuracy_loss: The limit of the accuracy lost.
        workers: Number of decoding threads. 0: one per CPU.

    Raises:
        RunError: ``out`` is not empty.
        DataError: The folder lacks validation images, or has no readable training images.
        BundleError: The bundle has no graph, its head was fitted to the validation photos, or the graph in int8 is not accurate
            enough.
    """
    require_empty_folder(out)
    if bundle.is_head_only:
        raise BundleError(f"The bundle {bundle.path} has no graph. Run `finetune merge {bundle.path}` first.")
    if bundle.manifest["provenance"].get("folds"):
        raise BundleError(
            f"The head of {bundle.path} was fitted to its validation photos too (--refit), so they cannot test int8. Train it "
            "again without --no-int8."
        )
    data = _read_data(bundle, data_dir, labels, max_accuracy_loss, workers)
    manifest = {name: value for name, value in bundle.manifest.items() if name not in ("format", "files", "sha256")}
    manifest["quantized_from"] = bundle.version

    def write_files(folder: Path) -> None:
        for name in set(bundle.manifest["files"]) - {INT8_GRAPH}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
        manifest["int8"] = add_int8_graph(
            folder / GRAPH,
            data,
            temperature=float(bundle.manifest["temperature"]),
            max_ood_score=bundle.decision_rule.max_ood_score,
        )
        if reason := manifest["int8"]["reason"]:
            raise BundleError(f"int8 not kept: {reason}. No bundle was written.")
        with np.load(folder / GOLDEN) as arrays:
            golden = {name: arrays[name] for name in ("pixels", *bundle.engine_outputs)}
        golden |= golden_outputs(folder / INT8_GRAPH, golden["pixels"], bundle.engine_outputs)
        np.savez_compressed(folder / GOLDEN, **golden)
        write_model_card(folder / MODEL_CARD, manifest)

    return write_bundle(out, manifest, write_files=write_files)


def _read_data(bundle: Bundle, data_dir: Path, labels: Path | None, max_accuracy_loss: float, workers: int) -> QuantizationData:
    evaluated = Predictions.read_csv(bundle.path / PREDICTIONS)
    dataset = read_dataset(data_dir, labels=labels)
    own = set(evaluated.image_names)
    training = [sample.path for sample in dataset.in_split("train") if sample.name not in own]

    def training_pixels(path: Path) -> NDArray[np.uint8] | None:
        try:
            return bundle.preprocessing.pixels(read_image_file(path))
        except (ImageError, OSError):
            return None

    def validation_pixels(row: int) -> NDArray[np.uint8]:
        return bundle.preprocessing.pixels(read_inspected(data_dir / evaluated.image_names[row], evaluated.sha256s[row]))

    def read_training() -> NDArray[np.uint8]:
        paths: Iterable[Path] = (training[i] for i in evenly_spaced(len(training), CALIBRATION_IMAGES))
        readable = [pixels for pixels in threaded_map(training_pixels, paths, workers=workers) if pixels is not None]
        if not readable:
            raise DataError(f"{data_dir} has no readable training photos. Pass the data folder of the training.")
        return np.stack(readable)

    def fit(log_probs: NDArray[np.float64], true_labels: NDArray[np.int64]) -> float:
        """Keep the temperature of a balanced head, which was fitted for other class frequencies."""
        balanced = bundle.manifest.get("class_balance") or {}
        return float(bundle.manifest["temperature"]) if balanced.get("weights") else fit_temperature(log_probs, true_labels)

    return QuantizationData.of(
        evaluated,
        read_training=read_training,
        read_validation=lambda rows: threaded_map(validation_pixels, rows, workers=workers),
        fit_temperature=fit,
        max_accuracy_loss=max_accuracy_loss,
    )
