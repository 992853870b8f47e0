"""Prepare a training run: load the network, inspect the dataset, and build the feature cache and batches."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from finetune.compute import distributed
from finetune.compute.device import Compute
from finetune.config import BALANCED, Config
from finetune.data.apply_reviews import ReviewSummary, ReviewTable, apply_reviews
from finetune.data.audit import AuditReport, audit
from finetune.data.duplicates import find_linked, move_linked_to_train
from finetune.data.extra_data import drop_known_images
from finetune.data.image_folder import Dataset
from finetune.data.inspection import ImageRecord, fingerprint_context, inspect_images
from finetune.data.pixel_memory import PixelMemory
from finetune.features.cache import FeatureCache, cache_context
from finetune.features.extractor import FeatureExtractor
from finetune.io.array_store import ArrayStore
from finetune.io.progress import step
from finetune.training.augmentation import Augment, BatchAugment
from finetune.training.data_loaders import Batches, CachedBatches, InMemoryBatches, UncachedBatches
from models.artifacts.paths import default_cache_dir
from models.networks.classifier import Classifier, build_classifier, trainable_names
from models.networks.head_logits import require_logistic_head
from models.networks.spec import LOGISTIC, ModelSpec
from models.networks.split_point import SplitModel, split_model
from models.networks.weights import Weights, load_weights


@dataclass(frozen=True)
class TrainingNetwork:
    """A network ready to train, and its pretrained weights (``base``)."""

    spec: ModelSpec
    classifier: Classifier
    split_model: SplitModel
    extractor: FeatureExtractor
    base: Weights | None
    trainable_names: list[str]

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy the tensors that training changes, as named in ``split_model.trainable``."""
        state = self.split_model.trainable.state_dict()
        return {f"net.{name}": state[f"net.{name}"].detach().clone() for name in self.trainable_names}

    @contextlib.contextmanager
    def untrained(self, initial: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the trainable layers the weights ``initial`` in the block, to train them otherwise, and theirs after it."""
        trained = self.trainable_state()
        self.split_model.trainable.load_state_dict(initial, strict=False)
        try:
            yield
        finally:
            self.split_model.trainable.load_state_dict(trained, strict=False)

    @property
    def head_names(self) -> list[str]:
        """The tensors of the heads in ``split_model.trainable``."""
        return [f"net.{head}.{tensor}" for head in self.spec.heads for tensor in ("weight", "bias")]


@dataclass(frozen=True)
class PreparedDataset:
    """An inspected dataset.

    Attributes:
        dataset: The labeled images.
        audit_report: The findings of the audit.
        splits: The readable images by split.
        pixels: The images' pixels, as far as they were collected for training without a feature cache.
        reviews: Summary of the labels that reviews changed, if there are any.
        neither: Readable images of none of the classes, which have no part in training or validation.
    """

    dataset: Dataset
    audit_report: AuditReport
    splits: dict[str, list[ImageRecord]]
    pixels: PixelMemory
    reviews: ReviewSummary | None = None
    neither: tuple[ImageRecord, ...] = ()

    def labels(self, split: str) -> list[int]:
        """Return the class of each image of a split."""
        return [record.sample.label for record in self.splits[split]]

    def with_validation_in_training(self) -> PreparedDataset:
        """Return the dataset with all readable images in training."""
        return dataclasses.replace(self, splits={"train": [*self.splits["train"], *self.splits["valid"]], "valid": []})

    def groups(self, split: str) -> NDArray[np.int64]:
        """Number the sets of images of a split that belong into one fold, (N,). See ``find_linked``."""
        return find_linked(self.splits[split])


def prepare_network(spec: ModelSpec, num_classes: int, config: Config, compute: Compute) -> TrainingNetwork:
    """Load the pretrained weights, replace the head and split the network into frozen and trainable layers."""
    base = None
    if config.weights != "none":
        with step("Loading the pretrained weights"):
            base = load_weights(spec, file=Path(config.weights) if config.weights else None)
        note = "" if base.published else " (not the published weights)"
        print(f"Weights: {base.origin}, sha256 {base.sha256[:12]}...{note}")
    with step("Building the network"):
        classifier = build_classifier(
            spec,
            num_classes=num_classes,
            base=base.tensors if base else None,
            unfreeze=config.unfreeze,
            seed=config.seed,
            permute_pixels=config.permute_pixels,
            normalize_embedding=config.normalizes_embedding,
        )
        if config.head == LOGISTIC:
            require_logistic_head(classifier, spec)
        split = split_model(classifier)
    extractor = FeatureExtractor(split, spec.preprocessing, compute)
    return TrainingNetwork(spec, classifier, split, extractor, base, trainable_names(classifier.net))


def build_feature_cache(config: Config, network: TrainingNetwork, compute: Compute) -> FeatureCache | None:
    """Create the feature cache, or print why there is none and return None."""
    reason = (
        "all weights are trained and nothing is frozen"
        if network.base is None
        else "--unfreeze trains deeper layers"
        if config.unfreeze
        else "--augment changes the photos in every epoch"
        if config.augment
        else "--no-feature-cache was given"
        if not config.feature_cache
        else None
    )
    if reason:
        print(f"No feature cache because {reason}. Every epoch runs every photo through the complete network.")
        return None
    assert network.base is not None
    context = cache_context(
        backbone=network.spec.name,
        weights_sha256=network.base.sha256,
        preprocessing=network.spec.preprocessing,
        last_frozen=network.split_model.last_frozen,
        precision=compute.precision,
        engine=network.extractor.engine,
        permute_pixels=config.permute_pixels,
    )
    store = ArrayStore(config.cache_dir or default_cache_dir(), context, limit_mb=config.cache_limit_mb)
    print(f"Features are computed once per photo, up to {network.split_model.last_frozen}.")
    return FeatureCache(network.extractor, store, workers=config.workers)


def prepare_dataset(
    config: Config,
    dataset: Dataset,
    network: TrainingNetwork,
    cache: FeatureCache | None,
    *,
    reviews: ReviewTable | None = None,
) -> PreparedDataset:
    """Inspect and audit the images and print the findings.

    Images of extra folders that are already in the dataset are dropped and ``reviews`` are applied before the audit. If
    validation was split from training, near duplicates and groups across both are moved to training.

    Args:
        config: The settings of the run.
        dataset: The dataset.
        network: The network to train.
        cache: The feature cache, if any. It computes the missing features while the images are inspected.
        reviews: Reviewed labels to apply.

    Raises:
        DataError: The audit found a problem that would invalidate the training run, such as leakage between splits.
    """
    preprocessing = network.spec.preprocessing
    context = fingerprint_context(preprocessing.decode_px)
    store = ArrayStore(config.cache_dir or default_cache_dir(), context, limit_mb=config.cache_limit_mb)
    distributed.require_same_on_all_ranks(
        f"photos in {config.data_dir}", [[sample.name, sample.split] for sample in dataset.samples]
    )
    print(f"Inspecting {len(dataset.samples):,} photos{' and computing missing features' if cache else ''} ...", flush=True)
    samples = [*dataset.samples, *dataset.neither]
    pixels = PixelMemory(preprocessing, workers=config.workers)
    consumer = cache or (pixels if pixels.can_hold(samples, augmented=config.augment) else None)
    records = distributed.map_sharded(
        samples,
        lambda own: inspect_images(own, store=store, preprocessing=preprocessing, consumer=consumer, workers=config.workers),
        name=lambda sample: sample.name,
    )
    # map_sharded returns records with the paths of other hosts
    records = [dataclasses.replace(s, sample=sample) for s, sample in zip(records, samples, strict=True)]
    records, neither = records[: len(dataset.samples)], records[len(dataset.samples) :]
    dataset, records, dropped_extra = drop_known_images(dataset, records)
    applied = None
    if reviews:
        dataset, records, applied = apply_reviews(reviews, dataset, records)
        print(applied.text())
    dataset, records = move_linked_to_train(dataset, records)
    audit_report = audit(dataset, records, neither=neither, dropped_extra=dropped_extra)
    print(audit_report.text())
    audit_report.raise_for_problems(allow_leakage=config.allow_leakage, allow_class_mismatch=config.allow_class_mismatch)
    splits = {split: [s for s in records if s.error is None and s.sample.split == split] for split in ("train", "valid")}
    return PreparedDataset(dataset, audit_report, splits, pixels, applied, tuple(s for s in neither if s.error is None))


def make_batches(
    config: Config, network: TrainingNetwork, cache: FeatureCache | None, prepared: PreparedDataset, split: str
) -> Batches:
    """Build the batches of a split, or of ``neither``. With a cache, missing features are computed here."""
    assert config.batch_size is not None
    records = list(prepared.neither) if split == "neither" else prepared.splits[split]
    labels = [record.sample.label for record in records]
    balanced = config.sampling == BALANCED
    if cache:
        rows = cache.features(records, network.spec.preprocessing, label=f"features of {split}")
        return CachedBatches(rows, labels, batch_size=config.batch_size, seed=config.seed, balanced=balanced)
    network.extractor.compile()
    preprocessing = network.spec.preprocessing
    is_augmented = config.augment and split == "train"
    if prepared.pixels.can_hold([s.sample for s in records], augmented=is_augmented):
        return InMemoryBatches(
            prepared.pixels.take(records),
            labels,
            frozen=network.extractor,
            augment=BatchAugment(config.seed) if is_augmented else None,
            batch_size=config.batch_size,
            seed=config.seed,
            balanced=balanced,
        )
    return UncachedBatches(
        records,
        preprocessing=preprocessing,
        frozen=network.extractor,
        augment=Augment(preprocessing, config.seed) if is_augmented else None,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        balanced=balanced,
    )
