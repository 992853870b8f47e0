"""Out-of-fold predictions for a dataset: cross-validate a bundle's recipe with one head per fold.

The base weights, settings and seed are those of the bundle. Training and validation images are split into stratified folds,
with near duplicates and groups in the same fold. Each fold's head trains on the other folds for the bundle's best number of
epochs, so no image influences when to stop, and is calibrated with the bundle's temperature. Frozen features come from the
cache, so the cost is that of training a few heads.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from tqdm import tqdm

from finetune import config as settings
from finetune.compute.device import Compute, select_compute
from finetune.config import BALANCED, Config
from finetune.data.apply_reviews import ReviewTable
from finetune.data.duplicates import find_linked
from finetune.data.embeddings import build_similarity_index
from finetune.data.image_folder import read_dataset
from finetune.data.inspection import ImageRecord, table_columns
from finetune.evaluation.evaluate import Evaluation, default_output_dir
from finetune.features.cache import FeatureCache
from finetune.io.output_folder import require_empty_folder
from finetune.metrics.calibration import apply_temperature
from finetune.metrics.ood_detection import out_of_fold_scores
from finetune.reports.results import write_results
from finetune.training.class_balance import ClassBalance, class_balance
from finetune.training.data_loaders import CachedBatches
from finetune.training.logistic_head import fit_head_once
from finetune.training.setup import PreparedDataset, TrainingNetwork, build_feature_cache, prepare_dataset, prepare_network
from finetune.training.trainer import BAR_FORMAT, learning_rate, make_optimizer, predict_with_embeddings, train_one_epoch
from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.data_folder import class_name
from models.artifacts.evaluation import OUT_OF_FOLD, write_evaluation
from models.artifacts.predictions import Predictions
from models.errors import BundleError, DataError, list_names
from models.networks.registry import get_spec
from models.networks.spec import LOGISTIC

SPLIT = "train and valid"
FOLDS = 5  # default of a training run's own cross-validation


@dataclass(frozen=True, eq=False)
class Outputs:
    """Log-probabilities (N, classes) of images that a head was not trained on, and their labels (N,).

    ``folds`` are the heads of a cross-validation, if the outputs are out of fold.
    """

    log_probs: NDArray[np.float64]
    labels: NDArray[np.int64]
    folds: FoldHeads | None = None


@dataclass(frozen=True, eq=False)
class FoldHeads:
    """The last layer of each fold's network, and the fold (N,) of each image that it was not trained on."""

    heads: Sequence[nn.Module]
    fold_of: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.heads)

    def log_probs(self, embeddings: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predict the images ``rows`` from their embeddings (n, d), each by the head of its fold: (n, classes)."""
        classes = next(self.heads[0].parameters()).shape[0]
        log_probs = np.zeros((len(rows), classes))
        for fold, head in enumerate(self.heads):
            own = self.fold_of[rows] == fold
            with torch.inference_mode():
                log_probs[own] = head(torch.from_numpy(embeddings[own])).double().log_softmax(dim=1).numpy()
        return log_probs


def cross_validate(
    bundle_dir: Path,
    data_dir: Path,
    *,
    folds: int,
    label_table: Path | None = None,
    out: Path | None = None,
    weights: Path | None = None,
    reviews: ReviewTable | None = None,
    workers: int = 0,
    cache_dir: Path | None = None,
) -> Evaluation:
    """Predict every training and validation image out of fold and write an evaluation to ``out``.

    Args:
        bundle_dir: The bundle whose training is repeated.
        data_dir: The dataset that the bundle was trained on.
        folds: Number of folds, 2 or more.
        label_table: Table of the labels.
        out: A new or empty folder for the results. None: ``default_output_dir``.
        weights: File of the pretrained weights, if they are not found automatically.
        reviews: Reviewed labels to apply before training.
        workers: Number of decoding threads. 0: one per CPU.
        cache_dir: Folder of the feature cache.

    Raises:
        BundleError: The bundle's training cannot be repeated on cached features, or the base weights differ.
        DataError: The dataset does not match the bundle or has too few images.
    """
    bundle = open_bundle(bundle_dir)
    config = training_config(bundle, data_dir, weights=weights, workers=workers, cache_dir=cache_dir)
    dataset = read_dataset(data_dir, labels=label_table, valid_fraction=config.valid_fraction, seed=config.seed)
    if dataset.classes != tuple(map(class_name, bundle.classes)):
        raise DataError(
            f"The classes of {data_dir} ({list_names(dataset.classes)}) differ from those of the bundle "
            f"({list_names(bundle.classes)}). Use the data that the bundle was trained on."
        )
    out = out or default_output_dir(bundle_dir, data_dir, f"{folds}-folds")
    require_empty_folder(out)
    compute = select_compute(config.device, config.precision)
    network = prepare_network(get_spec(bundle.backbone), len(bundle.classes), config, compute)
    if network.base is None or network.base.sha256 != bundle.manifest["base"]["sha256"]:
        raise BundleError(f"The bundle {bundle_dir} was trained on other base weights. Pass their file with --weights.")
    cache = build_feature_cache(config, network, compute)
    assert cache is not None, "training_config rejects bundles without a feature cache"
    prepared = prepare_dataset(config, dataset, network, cache, reviews=reviews)
    records = [*prepared.splits["train"], *prepared.splits["valid"]]
    features = cache.features(records, network.spec.preprocessing, label="features")
    labels = np.array([s.sample.label for s in records], dtype=np.int64)
    fold_of = assign_folds(records, labels, folds=folds, classes=bundle.classes, seed=config.seed)
    epochs = int(bundle.manifest["provenance"]["best_epoch"])
    temperature = float(bundle.manifest["temperature"])
    outputs, embeddings = predict_out_of_fold(
        network,
        features,
        labels,
        fold_of,
        config,
        groups=find_linked(records),
        classes=bundle.classes,
        epochs=epochs,
        correction=temperature * ((bundle.manifest.get("class_balance") or {}).get("correction") or 0.0),
        compute=compute,
    )
    ood_scores = None
    if bundle.has_ood_score:
        every = np.ones(len(labels), np.bool_)
        ood_scores = out_of_fold_scores(embeddings, labels, fold_of, is_training=every, seed=config.seed)
    predictions = Predictions(
        classes=bundle.classes,
        image_names=tuple(s.sample.name for s in records),
        labels=labels,
        probabilities=apply_temperature(outputs.log_probs, temperature),
        splits=tuple(s.sample.split for s in records),
        sha256s=tuple(s.sha256 for s in records),
        **table_columns(records),
        ood_scores=ood_scores,
    )
    metrics = write_results(
        out,
        predictions,
        similarity=build_similarity_index(predictions.sha256s, embeddings, records, bundle.classes),
        uncalibrated=apply_temperature(outputs.log_probs, 1.0),
        temperature=temperature,
        data_dir=data_dir,
        rule=bundle.decision_rule,
        seed=config.seed,
    )
    fold_training = {"epochs": epochs, "seed": config.seed, "reviews": prepared.reviews.as_dict() if prepared.reviews else None}
    write_evaluation(
        out,
        bundle,
        kind=OUT_OF_FOLD,
        classes=bundle.classes,
        split=SPLIT,
        temperature=temperature,
        folds=folds,
        fold_training=fold_training,
    )
    return Evaluation(out, predictions, metrics)


def training_config(bundle: Bundle, data_dir: Path, *, weights: Path | None, workers: int, cache_dir: Path | None) -> Config:
    """Return the settings that the bundle was trained with, for ``data_dir``.

    Raises:
        BundleError: The bundle has no frozen features that can be cached.
    """
    saved: Mapping[str, Any] = bundle.manifest["provenance"]["config"]
    reason = (
        "all of its weights were trained"
        if bundle.manifest["base"] is None
        else "it was trained with --unfreeze"
        if saved["unfreeze"]
        else "it was trained with --augment"
        if saved["augment"]
        else None
    )
    if reason:
        raise BundleError(
            f"--folds requires frozen features, which {bundle.path} does not have because {reason}. "
            "Evaluate it on unseen photos with --split instead."
        )
    return dataclasses.replace(
        settings.from_mapping(saved),
        data_dir=data_dir,
        weights=str(weights) if weights else None,
        workers=workers,
        cache_dir=cache_dir,
        feature_cache=True,
        device="auto",
        allow_leakage=True,  # near duplicates share a fold
        allow_class_mismatch=True,
    )


def assign_folds(
    records: list[ImageRecord], labels: NDArray[np.int64], *, folds: int, classes: tuple[str, ...], seed: int
) -> NDArray[np.int64]:
    """Assign images to folds, stratified by class, with near duplicates and groups in the same fold.

    Returns:
        The fold of each image, (N,).

    Raises:
        DataError: A class has fewer images than there are folds, or is in one group.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < folds:
        smallest = int(counts.argmin())
        raise DataError(
            f"--folds is {folds}, but the class {classes[smallest]} has only {counts[smallest]} photos. "
            "Every fold needs one of each class."
        )
    groups = find_linked(records)
    if len(np.unique(groups)) < folds:
        raise DataError(f"--folds is {folds}, but the photos are in only {len(np.unique(groups))} groups. Use fewer folds.")
    fold_of = np.zeros(len(records), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, rows) in enumerate(splitter.split(groups, labels, groups)):
        fold_of[rows] = fold
    for label, name in enumerate(classes):
        if len(np.unique(fold_of[labels == label])) < 2:
            raise DataError(
                f"All photos of the class {name} are in one fold, because they are near duplicates or of one group. Add photos "
                "of other groups, or use other folds."
            )
    return fold_of


def predict_out_of_fold(
    network: TrainingNetwork,
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    fold_of: NDArray[np.int64],
    config: Config,
    *,
    groups: NDArray[np.int64],
    classes: Sequence[str],
    epochs: int,
    correction: float = 0.0,
    compute: Compute,
) -> tuple[Outputs, NDArray[np.float32]]:
    """Train a head per fold on the other folds and predict the images of its fold.

    Args:
        network: The network. Its trainable layers end in the state of the last fold.
        features: Cached features, (N, ...).
        labels: True classes, (N,).
        fold_of: The fold of each image, (N,).
        config: The settings of training.
        groups: The number of each image's group, (N,).
        classes: The class names.
        epochs: Number of epochs.
        correction: How much of the class weights to correct, as a factor of ``ClassBalance.logit_shift``.
        compute: Device and precision.

    Returns:
        The outputs, whose log-probabilities are up to a constant per image, and embeddings (N, d). Both have the order of
        ``features``.
    """
    module = network.split_model.trainable
    names = [f"net.{name}" for name in network.trainable_names]
    initial = {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if name in names}
    log_probs = np.zeros((len(labels), len(classes)))
    embeddings: list[NDArray[np.float32]] = []
    order: list[int] = []
    heads: list[nn.Module] = []
    folds = int(fold_of.max()) + 1
    for fold in range(folds):
        held_out, others = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        module.load_state_dict(initial, strict=False)
        train = _batches(features, labels, others, config)
        balance = class_balance(config, labels[others].tolist(), classes)
        title = f"fold {fold + 1} of {folds}"
        own_groups = groups[others]
        fit_fold(network, train, config, groups=own_groups, balance=balance, epochs=epochs, compute=compute, label=title)
        heads.append(copy.deepcopy(network.classifier.net.get_submodule(network.spec.head)).cpu())
        held_out_batches = _batches(features, labels, held_out, config)
        fold_log_probs, _, fold_embeddings = predict_with_embeddings(network, held_out_batches, compute=compute)
        shift = correction * balance.logit_shift if balance else 0.0
        log_probs[held_out] = fold_log_probs.double().numpy() + shift
        embeddings.append(fold_embeddings)
        order += held_out.tolist()
    return Outputs(log_probs, labels, FoldHeads(heads, fold_of)), np.concatenate(embeddings)[np.argsort(order)]


def cross_validate_head(
    config: Config,
    network: TrainingNetwork,
    cache: FeatureCache,
    prepared: PreparedDataset,
    *,
    epochs: int,
    compute: Compute,
) -> Outputs | None:
    """Predict the training and validation images of a run out of fold, without a correction of class weights.

    Args:
        config: The settings of the run.
        network: The network with its initial weights.
        cache: The cached features.
        prepared: The dataset.
        epochs: Number of epochs of each head.
        compute: Device and precision.

    Returns:
        The outputs, or None if there are too few images or groups.

    Raises:
        DataError: There are too few, and the settings need the outputs (``--refit``).
    """
    records = [*prepared.splits["train"], *prepared.splits["valid"]]
    labels = np.array([s.sample.label for s in records], dtype=np.int64)
    classes = prepared.dataset.classes
    folds = max(2, min(FOLDS, int(np.bincount(labels, minlength=len(classes)).min())))
    try:
        fold_of = assign_folds(records, labels, folds=folds, classes=classes, seed=config.seed)
    except DataError:
        if config.refit:
            raise DataError(
                "--refit needs at least two photos of every class, not near duplicates or of one group, for cross-validation. "
                "Add photos or remove it."
            ) from None
        return None
    features = cache.features(records, network.spec.preprocessing, label="features")
    outputs, _ = predict_out_of_fold(
        network,
        features,
        labels,
        fold_of,
        config,
        groups=find_linked(records),
        classes=classes,
        epochs=epochs,
        compute=compute,
    )
    return outputs


def fit_fold(
    network: TrainingNetwork,
    train: CachedBatches,
    config: Config,
    *,
    groups: NDArray[np.int64],
    balance: ClassBalance | None,
    epochs: int,
    compute: Compute,
    label: str,
) -> None:
    """Train the layers after the split point for ``epochs`` of the recipe's schedule, without validation in between.

    A logistic head has no epochs. Its penalty is selected again for each fold, so that no held-out image influences it.
    """
    if config.head == LOGISTIC:
        print(f"Training {label} ...")
        fit_head_once(network, train, config, compute=compute, groups=groups, balance=balance)
        return
    module = network.split_model.trainable
    module.to(compute.device)
    optimizer = make_optimizer(module, config, head=network.head_names)
    with tqdm(total=epochs * len(train), desc=label, bar_format=BAR_FORMAT, disable=None, leave=False) as bar:
        if bar.disable:
            print(f"Training {label} ...")
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch) * group["scale"]
            torch.manual_seed(config.seed * 1_000_003 + epoch)
            train_one_epoch(module, train, optimizer, epoch, compute=compute, balance=balance, bar=bar)


def _batches(features: NDArray[np.float32], labels: NDArray[np.int64], rows: NDArray[np.intp], config: Config) -> CachedBatches:
    assert config.batch_size is not None
    balanced = config.sampling == BALANCED
    return CachedBatches(
        features, labels[rows].tolist(), rows=rows, batch_size=config.batch_size, seed=config.seed, balanced=balanced
    )
