"""One training from a folder of photos to a bundle: the flow, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune import rundir
from finetune.audit import Audit, audit
from finetune.augment import Augment
from finetune.batches import Batches, CachedBatches, LiveBatches
from finetune.calibrate import apply_temperature, fit_temperature
from finetune.config import Config, default_cache_dir
from finetune.data import Dataset, move_to_train, read_dataset
from finetune.device import Compute, choose_compute
from finetune.duplicates import find_duplicates
from finetune.export import PARITY_PHOTOS, Parity, export_bundle
from finetune.features import FeatureCache, FrozenPart, cache_context
from finetune.metrics import format_summary
from finetune.predictions import Predictions
from finetune.provenance import describe_run
from finetune.results import write_results
from finetune.scan import FINGERPRINT_CONTEXT, PixelStash, Scan, scan
from finetune.shards import ShardStore
from finetune.tensorboard import EventWriter
from finetune.train import Progress, fit, predict
from models.bundle import Bundle, open_bundle
from models.classifier import Classifier, build_classifier, trained_names
from models.cut import Cut, cut
from models.files import write_text
from models.registry import get_spec
from models.spec import ModelSpec
from models.weights import Weights, find_weights


@dataclass(frozen=True)
class _Network:
    """A network ready to train, and what it started from."""

    spec: ModelSpec
    classifier: Classifier
    cut: Cut
    base: Weights | None
    names: list[str]

    @property
    def has_frozen_part(self) -> bool:
        return self.base is not None


def train(config: Config, *, resume: bool = False) -> Bundle:
    """Train as ``config`` says, write the run's folder, and give its bundle.

    Prints what it does. A run that was interrupted goes on with ``resume``; one that is finished is only opened.
    Raises UserError for every mistake that a person can mend.
    """
    spec = get_spec(config.backbone)
    config = config.with_recipe(spec.recipe)
    folder = config.output_dir or default_run_dir(config)
    if resume:
        rundir.check_same(folder, config)
        if (folder / rundir.BUNDLE).is_dir():
            print(f"The run in {folder} is finished.")
            return open_bundle(folder / rundir.BUNDLE)
    compute = choose_compute(config.device, config.precision)
    dataset = read_dataset(config.data_dir, valid_fraction=config.valid_fraction, seed=config.seed)
    network = _prepare(spec, dataset, config)
    if not resume:
        rundir.start(folder, config)
    print(f"Training {spec.title} on {config.data_dir} ({compute}); the run is in {folder}")
    with _resumable(folder):
        return _train(config, folder, dataset, network, compute)


def default_run_dir(config: Config) -> Path:
    return Path("runs") / default_name(config)


def default_name(config: Config) -> str:
    return f"{config.data_dir.resolve().name}-{config.backbone.replace(':', '-').replace('/', '-')}"


def _prepare(spec: ModelSpec, dataset: Dataset, config: Config) -> _Network:
    """Load the pretrained weights, put the new head in and cut the network."""
    base = None
    if config.weights != "none":
        base = find_weights(spec, file=Path(config.weights) if config.weights else None)
        known = "" if base.published else " (not the published ones)"
        print(f"Weights: {base.origin}, sha256 {base.sha256[:12]}...{known}")
    classifier = build_classifier(
        spec,
        num_classes=len(dataset.classes),
        base=base.tensors if base else None,
        unfreeze=config.unfreeze,
        seed=config.seed,
    )
    return _Network(spec, classifier, cut(classifier), base, trained_names(classifier.net))


def _train(config: Config, folder: Path, dataset: Dataset, network: _Network, compute: Compute) -> Bundle:
    stash = PixelStash(network.spec.preprocessing)
    cache = _feature_cache(config, network, compute)
    dataset, scans, findings = _look(config, dataset, stash, cache)
    write_text(folder / "audit.json", json.dumps(findings.as_dict(), indent=2, ensure_ascii=False) + "\n")
    print(findings.text())
    findings.stop(allow_leakage=config.allow_leakage, allow_class_mismatch=config.allow_class_mismatch)

    good = {split: [s for s in scans if s.damage is None and s.photo.split == split] for split in ("train", "valid")}
    train_batches, valid_batches = (_batches(config, network, compute, cache, good[split], stash, split) for split in good)
    progress = _fit(config, folder, network, compute, train_batches, valid_batches, inputs=_inputs(good, network))

    log_probs, labels = predict(network.cut.trained, valid_batches, compute=compute)
    raw = log_probs.double().numpy()
    temperature = fit_temperature(raw, labels.numpy())
    predictions = Predictions(
        classes=dataset.classes,
        photos=tuple(s.photo.name for s in good["valid"]),
        labels=labels.numpy(),
        probabilities=apply_temperature(raw, temperature),
        splits=tuple(s.photo.split for s in good["valid"]),
        sha256s=tuple(s.sha256 for s in good["valid"]),
    )
    metrics = write_results(
        folder,
        predictions,
        uncalibrated=apply_temperature(raw, 1.0),
        temperature=temperature,
        data_dir=dataset.root,
        history=progress.history,
        seed=config.seed,
    )
    print(
        f"\nThe best epoch was {progress.best_epoch} of {progress.epoch}. On the validation photos:\n{format_summary(metrics)}\n"
    )
    state = network.classifier.net.cpu().state_dict()
    bundle = export_bundle(
        folder / rundir.BUNDLE,
        network.classifier.cpu(),
        network.spec,
        temperature=temperature,
        info=describe_run(
            name=config.name or default_name(config),
            spec=network.spec,
            base=network.base,
            cut_after=network.cut.after,
            classes=dataset.classes,
            metrics=metrics,
            config=config,
            compute=str(compute),
            progress=progress,
            findings=findings,
            scans=[*good["train"], *good["valid"]],
        ),
        trained={name: state[name] for name in network.names},
        results=folder,
        parity=_parity(good["valid"], predictions, network, compute),
        head_only=config.export == "head",
    )
    _say_where(folder, bundle)
    return bundle


def _feature_cache(config: Config, network: _Network, compute: Compute) -> FeatureCache | None:
    """The cache of the frozen part's output, or None where there is no such thing; says why."""
    why = (
        "all weights are trained"
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
    frozen = FrozenPart(network.cut, network.spec.preprocessing, compute)
    context = cache_context(
        backbone=network.spec.name,
        weights_sha256=network.base.sha256,
        preprocessing=network.spec.preprocessing,
        after=network.cut.after,
        precision=compute.precision,
        engine=frozen.engine,
    )
    store = ShardStore(config.cache_dir or default_cache_dir(), context, limit_mb=config.cache_limit_mb)
    print(f"The frozen part ends behind {network.cut.after}; it runs once for each photo.")
    return FeatureCache(frozen, store, workers=config.workers)


def _look(config: Config, dataset: Dataset, stash: PixelStash, cache: FeatureCache | None) -> tuple[Dataset, list[Scan], Audit]:
    """Scan and audit the photos. Where validation was held out by us, photos alike are kept on one side: in training."""
    store = ShardStore(config.cache_dir or default_cache_dir(), FINGERPRINT_CONTEXT, limit_mb=config.cache_limit_mb)
    scans = scan(
        dataset.photos,
        store=store,
        stash=stash if cache else None,
        wanted=cache.missing if cache else lambda sha256s: set(),
        workers=config.workers,
    )
    if dataset.split_from_train:
        across = [group for group in find_duplicates(scans) if len({s.photo.split for s in group}) > 1]
        twins = [s.photo.name for group in across for s in group]
        dataset = move_to_train(dataset, twins)
        scans = [dataclasses.replace(s, photo=photo) for s, photo in zip(scans, dataset.photos, strict=True)]
    return dataset, scans, audit(dataset, scans)


def _batches(
    config: Config,
    network: _Network,
    compute: Compute,
    cache: FeatureCache | None,
    scans: Sequence[Scan],
    stash: PixelStash,
    split: str,
) -> Batches:
    assert config.batch_size is not None
    if cache:
        rows = cache.features(scans, stash, label=f"features of {split}")
        return CachedBatches(rows, [s.photo.label for s in scans], batch_size=config.batch_size, seed=config.seed)
    augmented = config.augment and split == "train"
    return LiveBatches(
        [s.photo for s in scans],
        preprocessing=network.spec.preprocessing,
        frozen=FrozenPart(network.cut, network.spec.preprocessing, compute) if network.has_frozen_part else None,
        augment=Augment(network.spec.preprocessing, config.seed) if augmented else None,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
    )


def _fit(
    config: Config,
    folder: Path,
    network: _Network,
    compute: Compute,
    train_batches: Batches,
    valid_batches: Batches,
    *,
    inputs: str,
) -> Progress:
    before = rundir.load_checkpoint(folder, inputs=inputs)
    if before:
        print(f"Going on after epoch {before.epoch}.")
    with EventWriter(folder if config.tensorboard else None) as events:

        def on_epoch(progress: Progress) -> None:
            rundir.save_checkpoint(folder, progress, inputs=inputs)
            events.write(progress.history[-1])

        return fit(
            network.cut.trained,
            [f"net.{name}" for name in network.names],
            train_batches,
            valid_batches,
            config,
            compute=compute,
            head=[f"net.{network.spec.head}.{tensor}" for tensor in ("weight", "bias")],
            progress=before,
            on_epoch=on_epoch,
        )


def _inputs(good: dict[str, list[Scan]], network: _Network) -> str:
    """Name what a run is trained on: photos, labels, splits and base weights."""
    photos = [[s.photo.split, s.photo.label, s.sha256] for scans in good.values() for s in scans]
    base = network.base.sha256 if network.base else None
    return hashlib.sha256(json.dumps([photos, base]).encode()).hexdigest()


def _parity(scans: Sequence[Scan], predictions: Predictions, network: _Network, compute: Compute) -> Parity:
    """Validation photos spread over all of them, through the same preprocessing as a server's."""
    chosen = np.unique(np.linspace(0, len(scans) - 1, min(PARITY_PHOTOS, len(scans))).round().astype(int))
    stash = PixelStash(network.spec.preprocessing, limit_mb=0)
    pixels = np.stack([stash.take(scans[i].sha256, scans[i].photo.path) for i in chosen])
    return Parity(pixels, predictions.probabilities[chosen], compute.precision)


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted; go on with: finetune train --resume --output-dir {folder}")
        raise


def _say_where(folder: Path, bundle: Bundle) -> None:
    print(f"bundle       {bundle.path} (version {bundle.version})")
    print(f"model card   {bundle.path / 'README.md'}")
    print(f"metrics      {folder / 'metrics.json'}")
    print(f"predictions  {folder / 'predictions.csv'}")
    print(f"plots        {folder / 'plots'}")
