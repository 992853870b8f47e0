"""What a training needs before its first epoch: the network, one look at every photo, and the batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from finetune.compute import distributed
from finetune.compute.device import Compute
from finetune.config import Config
from finetune.data.apply_reviews import ReviewSummary, ReviewTable, apply_reviews
from finetune.data.audit import AuditReport, audit
from finetune.data.duplicates import find_duplicates
from finetune.data.extra_data import drop_known_images
from finetune.data.image_folder import Dataset, move_to_train
from finetune.data.inspection import ImageRecord, PixelCache, fingerprint_context, inspect_images
from finetune.features.extractor import FeatureCache, FeatureExtractor, cache_context
from finetune.io.array_store import ArrayStore
from finetune.training.augment import Augment
from finetune.training.data_loaders import Batches, CachedBatches, UncachedBatches
from models.artifacts.paths import default_cache_dir
from models.networks.classifier import Classifier, build_classifier, trainable_names
from models.networks.spec import ModelSpec
from models.networks.split_point import SplitModel, split_model
from models.networks.weights import Weights, load_weights


@dataclass(frozen=True)
class TrainingNetwork:
    """A network ready to train, and what it started from."""

    spec: ModelSpec
    classifier: Classifier
    split_model: SplitModel
    extractor: FeatureExtractor
    base: Weights | None
    trainable_names: list[str]


@dataclass(frozen=True)
class PreparedDataset:
    """The dataset after one look at every photo: what was found, the readable photos by split, and their pixels.

    ``reviews`` is what people's decisions changed, where there are any.
    """

    dataset: Dataset
    audit_report: AuditReport
    splits: dict[str, list[ImageRecord]]
    pixel_cache: PixelCache
    reviews: ReviewSummary | None = None


def prepare_network(spec: ModelSpec, num_classes: int, config: Config, compute: Compute) -> TrainingNetwork:
    """Load the pretrained weights, put the new head in and cut the network."""
    base = None
    if config.weights != "none":
        base = load_weights(spec, file=Path(config.weights) if config.weights else None)
        note = "" if base.published else " (not the published ones)"
        print(f"Weights: {base.origin}, sha256 {base.sha256[:12]}...{note}")
    classifier = build_classifier(
        spec,
        num_classes=num_classes,
        base=base.tensors if base else None,
        unfreeze=config.unfreeze,
        seed=config.seed,
        permute_pixels=config.permute_pixels,
    )
    parts = split_model(classifier)
    extractor = FeatureExtractor(parts, spec.preprocessing, compute)
    return TrainingNetwork(spec, classifier, parts, extractor, base, trainable_names(classifier.net))


def build_feature_cache(config: Config, network: TrainingNetwork, compute: Compute) -> FeatureCache | None:
    """The cache of the frozen part's output, or None where there is no such thing; says why."""
    why = (
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
    if why:
        print(f"No feature cache, as {why}: every epoch runs every photo through the whole network.")
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
    print(f"The frozen part ends behind {network.split_model.last_frozen}; it runs once for each photo.")
    return FeatureCache(network.extractor, store, workers=config.workers)


def prepare_dataset(
    config: Config,
    dataset: Dataset,
    network: TrainingNetwork,
    cache: FeatureCache | None,
    *,
    reviews: ReviewTable | None = None,
) -> PreparedDataset:
    """Scan and audit the photos, print the findings, and stop (DataError) where training on them would deceive.

    Photos of further folders that the data folder has are left out, and ``reviews`` applied, before that. Where validation
    was held out of training, photos that look alike are kept on one side: in training.
    """
    pixel_cache = PixelCache(network.spec.preprocessing)
    context = fingerprint_context(pixel_cache.preprocessing.decode_px)
    store = ArrayStore(config.cache_dir or default_cache_dir(), context, limit_mb=config.cache_limit_mb)
    select_pixels = cache.missing if cache else None
    distributed.require_same_on_all_ranks(
        f"photos in {config.data_dir}", [[sample.name, sample.split] for sample in dataset.samples]
    )
    records = distributed.map_sharded(
        dataset.samples,
        lambda own: inspect_images(
            own, store=store, pixel_cache=pixel_cache, select_pixels=select_pixels, workers=config.workers
        ),
        name=lambda sample: sample.name,
    )
    # this host's paths
    records = [dataclasses.replace(s, sample=sample) for s, sample in zip(records, dataset.samples, strict=True)]
    dataset, records, dropped_extra = drop_known_images(dataset, records)
    applied = None
    if reviews:
        dataset, records, applied = apply_reviews(reviews, dataset, records)
        print(applied.text())
    if dataset.split_from_train:
        across = [group for group in find_duplicates(records) if len({s.sample.split for s in group}) > 1]
        dataset = move_to_train(dataset, (s.sample.name for group in across for s in group))
        records = [dataclasses.replace(s, sample=sample) for s, sample in zip(records, dataset.samples, strict=True)]
    audit_report = audit(dataset, records, dropped_extra=dropped_extra)
    print(audit_report.text())
    audit_report.raise_for_problems(allow_leakage=config.allow_leakage, allow_class_mismatch=config.allow_class_mismatch)
    splits = {split: [s for s in records if s.error is None and s.sample.split == split] for split in ("train", "valid")}
    return PreparedDataset(dataset, audit_report, splits, pixel_cache, applied)


def make_batches(
    config: Config, network: TrainingNetwork, cache: FeatureCache | None, prepared: PreparedDataset, split: str
) -> Batches:
    """The batches of one split; with a cache the frozen part runs here, over the photos that it does not know."""
    assert config.batch_size is not None
    records = prepared.splits[split]
    if cache:
        rows = cache.features(records, prepared.pixel_cache, label=f"features of {split}")
        return CachedBatches(rows, [s.sample.label for s in records], batch_size=config.batch_size, seed=config.seed)
    augmented = config.augment and split == "train"
    return UncachedBatches(
        [s.sample for s in records],
        preprocessing=network.spec.preprocessing,
        frozen=network.extractor,
        augment=Augment(network.spec.preprocessing, config.seed) if augmented else None,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
    )
