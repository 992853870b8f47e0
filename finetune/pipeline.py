"""Train a classifier on an image folder and export it as a bundle: the steps of ``finetune train``."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.compute import distributed
from finetune.compute.device import Compute, select_compute
from finetune.config import Config
from finetune.data.builtin_datasets import make_dataset, source_folder, with_data_dir
from finetune.data.embeddings import build_similarity_index
from finetune.data.image_folder import read_dataset
from finetune.data.inspection import ChangedImageError, ImageRecord, read_pixels, table_columns
from finetune.data.label_source import locate_data
from finetune.data.review_source import hide_password, load_reviews
from finetune.evaluation.cross_validation import Outputs, cross_validate_head
from finetune.evaluation.fit_ood import OODFit, fit_records, neither_folder
from finetune.evaluation.held_out import held_out_predictions
from finetune.evaluation.trained_head import TrainedHead, describe_balance, train_other_head
from finetune.export.exporter import PARITY_IMAGES, OODExport, ParitySample, export_bundle
from finetune.export.provenance import training_manifest
from finetune.export.quantization import CALIBRATION_IMAGES, NNCFProcess, Quantization, QuantizationData, evenly_spaced
from finetune.features.cache import FeatureCache
from finetune.io.progress import step
from finetune.io.threaded_map import threaded_map
from finetune.metrics.calibration import apply_temperature, fit_balanced_temperature, fit_temperature
from finetune.metrics.equivalence import images_needed
from finetune.metrics.learning_curve import learning_curve
from finetune.metrics.operating_points import min_probabilities, parse_targets
from finetune.presets import apply_preset
from finetune.reports.plot_process import PlotProcess
from finetune.reports.results import write_results
from finetune.training import run_directory
from finetune.training.class_balance import ClassBalance, class_balance, read_class_weights, require_weights_of_classes
from finetune.training.data_loaders import Batches
from finetune.training.epoch_events import EpochReporter
from finetune.training.head import train_head
from finetune.training.logistic_head import fit_head_once
from finetune.training.setup import (
    PreparedDataset,
    TrainingNetwork,
    build_feature_cache,
    make_batches,
    prepare_dataset,
    prepare_network,
)
from finetune.training.trainer import EpochRow, Progress, predict_with_embeddings
from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.bundle import GRAPH, HELD_OUT, MAX_NAME_BYTES, UNSAFE_IN_NAME, Bundle, open_bundle
from models.artifacts.decision_rule import DecisionRule
from models.artifacts.ood_score import HeldOutOODScores
from models.artifacts.predictions import Predictions
from models.errors import ConfigError, DataError
from models.networks.head_logits import require_shiftable_logits, shift_logits
from models.networks.onnx_export import export_serving_graph
from models.networks.registry import get_spec
from models.networks.spec import LINEAR, LOGISTIC, ModelSpec

Embeddings = NDArray[np.float32]


def train(config: Config, *, resume: bool = False) -> Bundle:
    """Train a network, write the run directory and export the bundle.

    Prints its progress. Nothing is written before the settings, the weights and the images have been checked.

    Args:
        config: The settings of the run. Unset hyperparameters come from the network's recipe.
        resume: Continue an interrupted run in ``config.output_dir``. A finished run is only opened.

    Returns:
        The exported bundle.

    Raises:
        UserError: For every error that the user can fix (settings, data, weights, storage).
    """
    source = source_folder(config)
    config = apply_preset(with_data_dir(config))
    spec = get_spec(config.backbone)
    config = resolve_config(config, spec)
    folder = config.output_dir or default_run_dir(config)
    distributed.require_same_on_all_ranks("class weights", config.class_weights)
    requested = config
    config = dataclasses.replace(config, reviews_from=config.reviews_from and hide_password(config.reviews_from))
    if finished := distributed.run_on_main(lambda: open_run(folder, config, resume=resume)):
        print(f"The run in {folder} is already finished.")
        return finished
    if config.dataset:
        distributed.local_main_first(lambda: make_dataset(str(config.dataset), config.data_dir, source=source))
    reviews = distributed.run_on_main(lambda: load_reviews(requested, saved=folder / run_directory.REVIEWS if resume else None))
    compute = select_compute(config.device, config.precision, from_scratch=config.weights == "none")
    data_dir, labels = distributed.local_main_first(lambda: locate_data(config.data_dir, config.labels))
    dataset = read_dataset(
        data_dir, labels=labels, valid_fraction=config.valid_fraction, seed=config.seed, extra=map(Path, config.extra_data)
    )
    targets = _target_precisions(config, dataset.classes)
    require_weights_of_classes(config, dataset.classes)
    print(f"Training {spec.title} on {labels or data_dir} ({compute}). Run directory: {folder}")
    for number, extra in enumerate(config.extra_data, start=1):
        print(f"Extra data: {extra} (as extra-{number}/)")
    network = distributed.local_main_first(lambda: prepare_network(spec, len(dataset.classes), config, compute))
    distributed.check_supported(compute, network.split_model.trainable)
    distributed.require_same_on_all_ranks("pretrained weights", network.base.sha256 if network.base else None)
    cache = build_feature_cache(config, network, compute)
    prepared = prepare_dataset(config, dataset, network, cache, reviews=reviews)
    balance = class_balance(config, prepared.labels("train"), dataset.classes)
    if balance:
        require_shiftable_logits(network.classifier, spec)
    if not resume:
        distributed.run_on_main(lambda: run_directory.create_run(folder, config, reviews=reviews.data if reviews else None))
    lock = run_directory.locked(folder) if distributed.is_main_process() else contextlib.nullcontext()
    with lock, _resumable(folder), NNCFProcess() as nncf:
        batches = {split: make_batches(config, network, cache, prepared, split) for split in ("train", "valid")}
        if cache:
            network.extractor.release()  # all features are computed
        if _exports_int8(config, prepared) and distributed.is_main_process():
            nncf.start()
        initial = network.trainable_state() if cache else {}
        inputs = hash_inputs(prepared, network)
        progress = fit_head(config, folder, network, compute, batches, prepared, balance=balance, inputs=inputs)
        with step("Predicting the validation photos with the best epoch"):
            outputs, embeddings = predict_split(network, batches["valid"], compute)
        with step("Computing the embeddings of the training photos"):
            other_embeddings = {"train": predict_split(network, batches["train"], compute)[1]}
            if prepared.neither:
                neither = make_batches(config, network, cache, prepared, "neither")
                other_embeddings["neither"] = predict_split(network, neither, compute)[1]
                del neither
        held_out, other = None, None
        if cache and (balance or targets or config.refit):
            with network.untrained(initial):
                held_out = cross_validate_head(config, network, cache, prepared, epochs=progress.best_epoch, compute=compute)
        if cache and prepared.audit_report.is_imbalanced:
            with network.untrained(initial):
                other = train_other_head(
                    config,
                    network,
                    compute,
                    batches,
                    cache,
                    prepared,
                    outputs=outputs,
                    epochs=progress.best_epoch,
                )
        penalty = progress.history[-1].get("penalty")
        if cache and config.refit:
            with step("Fitting the head to the training and validation photos"):
                balance, penalty = refit_head(config, network, compute, cache, prepared)
                outputs = predict_split(network, batches["valid"], compute)[0]
        head = TrainedHead(outputs, balance, held_out, is_refit=bool(config.refit))
        batches.clear()  # the export needs their memory
        network.extractor.release()
        with PlotProcess() as plots:
            return distributed.run_on_main(
                lambda: write_outputs(
                    config,
                    folder,
                    network,
                    compute,
                    head,
                    embeddings,
                    other_embeddings,
                    prepared,
                    progress,
                    penalty=penalty,
                    other=other,
                    targets=targets,
                    plots=plots,
                    nncf=nncf,
                )
            )


def _exports_int8(config: Config, prepared: PreparedDataset) -> bool:
    """Return whether the export quantizes a graph, which needs enough validation images for its test."""
    train, valid = (len(prepared.splits[split]) for split in ("train", "valid"))
    tested = max(0, train - CALIBRATION_IMAGES) + valid if config.refit else valid
    return config.int8 and config.export != "head" and tested >= images_needed(config.max_accuracy_loss)


def _target_precisions(config: Config, classes: Sequence[str]) -> dict[str, float]:
    """Return the target precision of each class that has one. Raises ConfigError for an unknown class."""
    if config.target_precision is None:
        return {}
    parsed = parse_targets(str(config.target_precision), classes)
    return {name: target for name, target in parsed.items() if target is not None}


def open_run(folder: Path, config: Config, *, resume: bool) -> Bundle | None:
    """Check that a new run has an empty folder, or that ``folder`` contains the run to resume.

    Returns:
        The bundle of a run that is already finished, else None.
    """
    if not resume:
        run_directory.require_no_run(folder)
        return None
    run_directory.require_same_settings(folder, config)
    run_directory.remove_partial_files(folder)
    return open_bundle(folder / run_directory.BUNDLE) if (folder / run_directory.BUNDLE).is_dir() else None


def resolve_config(config: Config, spec: ModelSpec) -> Config:
    """Fill unset settings from the network's recipe, and train from random weights if it has no pretrained ones.

    The contents of a file of class weights replace its name.

    Raises:
        ConfigError: ``--export head`` for a network without pretrained weights, or the file of class weights is invalid.
    """
    if spec.weights is None and config.weights is None:
        if config.export == "head":
            raise ConfigError(f"--export head omits the pretrained weights, but {spec.title} has none. Remove --export.")
        config = dataclasses.replace(config, weights="none")
    return dataclasses.replace(config.with_recipe(spec.recipe), class_weights=read_class_weights(config.class_weights))


def default_run_dir(config: Config) -> Path:
    return Path("runs") / default_name(config)


def default_name(config: Config) -> str:
    """Name a bundle after the data folder, whose name may have any characters, and the network."""
    data = UNSAFE_IN_NAME.sub("-", config.data_dir.resolve().name.lstrip("."))
    backbone = UNSAFE_IN_NAME.sub("-", config.backbone.replace(":", "-"))
    return f"{_shorten(data, MAX_NAME_BYTES - len(backbone) - 1)}-{backbone}"


def _shorten(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def fit_head(
    config: Config,
    folder: Path,
    network: TrainingNetwork,
    compute: Compute,
    batches: Mapping[str, Batches],
    prepared: PreparedDataset,
    *,
    balance: ClassBalance | None = None,
    inputs: str,
) -> Progress:
    """Train the layers after the split point, resuming from the run's checkpoint, and save one after each epoch."""
    saved = distributed.run_on_main(lambda: run_directory.load_checkpoint(folder, inputs=inputs))
    if saved:
        print("The head is already fitted." if config.head == LOGISTIC else f"Resuming after epoch {saved.epoch}.")
    epochs = 1 if config.head == LOGISTIC else config.epochs
    assert epochs is not None, "Config.with_recipe fills this in"
    reporter = EpochReporter(
        epochs=epochs,
        head=config.head or LINEAR,
        train_images=len(batches["train"]),
        valid=prepared.splits["valid"],
        classes=prepared.dataset.classes,
        is_weighted=balance is not None,
        saved=saved,
    )
    with EventWriter(folder if config.tensorboard and distributed.is_main_process() else None) as events:

        def on_epoch(progress: Progress) -> None:
            distributed.run_on_main(lambda: run_directory.save_checkpoint(folder, progress, inputs=inputs))
            events.write(progress.history[-1])
            reporter.report(progress)

        return train_head(
            network, batches, config, prepared, compute=compute, balance=balance, progress=saved, on_epoch=on_epoch
        )


def refit_head(
    config: Config, network: TrainingNetwork, compute: Compute, cache: FeatureCache, prepared: PreparedDataset
) -> tuple[ClassBalance | None, float]:
    """Fit a logistic head to the images of both splits.

    Returns:
        The weights of their classes, and the penalty.
    """
    both = prepared.with_validation_in_training()
    balance = class_balance(config, both.labels("train"), both.dataset.classes)
    batches = make_batches(config, network, cache, both, "train")
    selection = fit_head_once(network, batches, config, compute=compute, groups=both.groups("train"), balance=balance)
    return balance, selection.penalty


class EventWriter:
    """Writes the rows of the history to ``run/tensorboard``. Does nothing if ``run`` is None."""

    def __init__(self, run: Path | None) -> None:
        self._writer = None
        if run is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def write(self, row: EpochRow) -> None:
        if self._writer:
            for name, value in row.items():
                if name != "epoch":
                    split, _, measure = name.partition("_")
                    tag = f"{measure}/{split}" if split in ("train", "valid") else name
                    self._writer.add_scalar(tag, value, int(row["epoch"]))
            self._writer.flush()


def predict_split(network: TrainingNetwork, batches: Batches, compute: Compute) -> tuple[Outputs, Embeddings]:
    """Predict the images of a split with the trained network.

    Returns:
        The outputs, and embeddings (N, d).
    """
    log_probs, labels, embeddings = predict_with_embeddings(network, batches, compute=compute)
    return Outputs(log_probs.double().numpy(), labels.numpy()), embeddings


def write_outputs(
    config: Config,
    folder: Path,
    network: TrainingNetwork,
    compute: Compute,
    head: TrainedHead,
    embeddings: Embeddings,
    other_embeddings: dict[str, Embeddings],
    prepared: PreparedDataset,
    progress: Progress,
    *,
    penalty: float | None = None,
    other: TrainedHead | None = None,
    targets: Mapping[str, float],
    plots: PlotProcess,
    nncf: NNCFProcess,
) -> Bundle:
    """Calibrate, evaluate and export the trained network.

    Args:
        config: The settings of the run.
        folder: The run directory.
        network: The trained network.
        compute: Device and precision.
        head: The network's outputs for the validation images, and the out-of-fold ones if there are any.
        embeddings: The embeddings of the validation images, (N, d).
        other_embeddings: Those of the training images (train), and of images of none of the classes (neither) if there are any.
            They are freed before the export.
        prepared: The dataset.
        progress: The state after the last epoch.
        penalty: The L2 penalty of a logistic head.
        other: The outputs of the head that was trained for comparison, if any.
        targets: The precision to keep, by class.
        plots: Draws the plots during the export.
        nncf: Quantizes the serving graph meanwhile.
    """
    atomic_write_text(folder / "audit.json", json.dumps(prepared.audit_report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    valid_records = prepared.splits["valid"]
    fitted, fitted_embeddings = prepared, other_embeddings["train"]
    if head.is_refit:
        fitted = prepared.with_validation_in_training()
        fitted_embeddings = np.concatenate([fitted_embeddings, embeddings])
    records = fitted.splits["train"] if head.is_refit else valid_records
    temperature = head.temperature
    if head.balance:
        shift_logits(network.classifier.net, network.spec.heads, torch.from_numpy(head.bias_shift))
    with step("Fitting the score of photos that are unlike the training photos"):
        ood = fit_records(
            fitted.splits["train"],
            fitted.splits["valid"],
            fitted_embeddings,
            embeddings[: len(fitted.splits["valid"])],
            is_frozen=network.base is not None and not config.unfreeze,
            false_alarms=config.false_alarms,
            seed=config.seed,
        )
    predictions = Predictions(
        classes=prepared.dataset.classes,
        image_names=tuple(s.sample.name for s in records),
        labels=head.evaluated.labels,
        probabilities=apply_temperature(head.scores, temperature),
        splits=tuple(s.sample.split for s in records),
        sha256s=tuple(s.sha256 for s in records),
        **table_columns(records),
        ood_scores=(ood.scores if head.is_refit else ood.parameters.scores(embeddings)) if ood else None,
    )
    classifier, graph = network.classifier.cpu(), nncf.folder / GRAPH
    with step("Exporting the serving graph"):
        export_serving_graph(classifier, network.spec, temperature=temperature, path=graph, ood=ood.parameters if ood else None)
    quantization = None
    if config.int8:
        quantization = Quantization(_quantization_data(config, network, head, prepared, predictions), nncf)
        if _exports_int8(config, prepared):
            quantization.start(graph)
    curve = None
    if penalty is not None:
        with step("Estimating what more training photos would bring"):
            curve = learning_curve(
                fitted_embeddings,
                np.array(fitted.labels("train"), dtype=np.int64),
                fitted.groups("train"),
                num_classes=len(prepared.dataset.classes),
                penalty=penalty,
                normalization=config.normalization,
                seed=config.seed,
            )
    operating_points = None
    if targets:
        unseen = held_out_predictions(head)
        unseen.write(folder / HELD_OUT)
        operating_points = unseen.manifest_fields(targets, prepared.dataset.classes)
    rule = DecisionRule(
        max_ood_score=ood.limit.max_score if ood else None,
        min_probability=min_probabilities(operating_points) if operating_points else {},
    )
    neither_scores = _neither_scores(ood, prepared, other_embeddings) if ood else {}
    metrics = write_results(
        folder,
        predictions,
        similarity=build_similarity_index(
            predictions.sha256s,
            fitted_embeddings if head.is_refit else embeddings,
            [*prepared.splits["train"], *valid_records],
            prepared.dataset.classes,
        ),
        uncalibrated=apply_temperature(head.scores, 1.0),
        temperature=temperature,
        data_dir=prepared.dataset.root,
        history=() if config.head == LOGISTIC else progress.history,
        rule=rule,
        neither_scores=neither_scores,
        curve=curve,
        seed=config.seed,
        plots=plots,
    )
    other_embeddings.clear()  # the export needs their memory
    del fitted_embeddings
    state = classifier.net.state_dict()
    return export_bundle(
        folder / run_directory.BUNDLE,
        graph,
        classifier,
        network.spec,
        temperature=temperature,
        training=training_manifest(
            name=config.name or default_name(config),
            spec=network.spec,
            base=network.base,
            last_frozen=network.split_model.last_frozen,
            classes=prepared.dataset.classes,
            metrics=metrics,
            config=config,
            compute=str(compute),
            progress=progress,
            penalty=penalty,
            folds=len(head.evaluated.folds) if head.evaluated.folds else None,
            audit_report=prepared.audit_report,
            records=[*prepared.splits["train"], *valid_records],
            labels=prepared.dataset.labels,
            reviews=prepared.reviews.as_dict() if prepared.reviews else None,
            class_balance=describe_balance(head, other, prepared.dataset.classes),
        ),
        trained_tensors={name: state[name] for name in network.trainable_names},
        evaluation_dir=folder,
        parity=_parity_sample(valid_records, head, embeddings, ood, network, compute),
        ood=_ood_export(ood, neither_scores) if ood else None,
        rule=rule,
        operating_points=operating_points,
        quantization=quantization,
        contents=config.export,
        plots=plots,
    )


def hash_inputs(prepared: PreparedDataset, network: TrainingNetwork) -> str:
    """Hash the images, labels, splits, reviews and base weights of a run, to reject resuming with different ones."""
    images = [[s.sample.split, s.sample.label, s.sha256] for records in prepared.splits.values() for s in records]
    base = network.base.sha256 if network.base else None
    reviews = [prepared.reviews.reviews.sha256] if prepared.reviews else []
    return hashlib.sha256(json.dumps([images, base, *reviews]).encode()).hexdigest()


def _parity_sample(
    records: Sequence[ImageRecord],
    head: TrainedHead,
    embeddings: Embeddings,
    ood: OODFit | None,
    network: TrainingNetwork,
    compute: Compute,
) -> ParitySample:
    """Select evenly spaced validation images and preprocess them as the service does."""
    rows = evenly_spaced(len(records), PARITY_IMAGES)
    pixels = np.stack([read_pixels(records[i], network.spec.preprocessing) for i in rows])
    probabilities = apply_temperature(head.outputs.log_probs[rows] + head.bias_shift, head.temperature)
    return ParitySample(pixels, probabilities, compute.precision, ood.parameters.scores(embeddings[rows]) if ood else None)


def _quantization_data(
    config: Config, network: TrainingNetwork, head: TrainedHead, prepared: PreparedDataset, predictions: Predictions
) -> QuantizationData:
    """Select evenly spaced images of training and validation. They are decoded again, only if they are needed.

    If the head was cross-validated for its evaluation, int8 is tested by the embeddings in int8 and the heads of the folds, on
    all images that it is not quantized with.
    """
    preprocessing = network.spec.preprocessing
    training, tested = prepared.splits["train"], prepared.splits["valid"]
    calibration = evenly_spaced(len(training), CALIBRATION_IMAGES)
    folds = head.evaluated.folds
    if folds:
        tested = [*training, *tested]

    def predict_out_of_fold(embeddings: Embeddings, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        assert folds
        return folds.log_probs(embeddings, rows) + head.bias_shift

    def read(records: Iterable[ImageRecord]) -> Iterator[NDArray[np.uint8]]:
        return threaded_map(lambda record: read_pixels(record, preprocessing), records, workers=config.workers)

    def fit(log_probs: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
        if head.balance is None:
            return fit_temperature(log_probs, labels)
        no_shift = np.zeros(log_probs.shape[1])  # the exported network is already corrected
        return fit_balanced_temperature(log_probs, labels, shift=no_shift, frequencies=head.balance.frequencies)[0]

    return QuantizationData.of(
        predictions,
        read_training=lambda: np.stack(list(read(training[i] for i in calibration))),
        read_validation=lambda rows: read(tested[i] for i in rows),
        fit_temperature=fit,
        max_accuracy_loss=config.max_accuracy_loss,
        predict_out_of_fold=predict_out_of_fold if folds else None,
        excluded=calibration if folds else (),
    )


def _neither_scores(
    ood: OODFit, prepared: PreparedDataset, embeddings: Mapping[str, Embeddings]
) -> dict[str, NDArray[np.float32]]:
    """Return the OOD scores of the images of none of the classes, by their folder."""
    if not prepared.neither:
        return {}
    table = prepared.dataset.labels.path if prepared.dataset.labels else None
    folders = np.array([neither_folder(record.sample.name, table) for record in prepared.neither])
    scores = ood.parameters.scores(embeddings["neither"])
    return {str(folder): scores[folders == folder] for folder in dict.fromkeys(folders)}


def _ood_export(ood: OODFit, neither_scores: Mapping[str, NDArray[np.float32]]) -> OODExport:
    return OODExport(ood.parameters, ood.as_dict(), HeldOutOODScores(ood.scores, neither_scores, ood.groups))


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted. Resume with: finetune train --resume --output-dir {folder}")
        raise
    except ChangedImageError as error:
        raise DataError(f"{error} Then resume with: finetune train --resume --output-dir {folder}") from None
