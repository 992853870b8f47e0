"""Measure what class weights and balanced sampling change for a rare class.

    python -m benchmarks.unequal_classes DATA [--small dogs] [--large-photos 500] [--small-photos 25] [--draws 5]

Each draw selects training photos at random and holds out a fifth of them for validation, as `finetune train` does without a
validation folder. A head is trained in each way on the same cached features and evaluated on all photos of DATA that were not
drawn. Two classes only. Prints the recall of both classes and their mean, the precision of the rare class and the log loss for
classes as frequent as in training and for equally frequent ones, and McNemar's exact test against the plain head on the photos
of the rare class. Precision depends on how frequent the classes are, so it is computed from both recalls for these frequencies.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.compute.device import Compute, select_compute
from finetune.config import Config
from finetune.data.image_folder import read_dataset
from finetune.evaluation.cross_validation import Outputs, cross_validate_head
from finetune.evaluation.trained_head import TrainedHead
from finetune.features.cache import FeatureCache
from finetune.metrics.calibration import apply_temperature
from finetune.training.class_balance import class_balance
from finetune.training.setup import (
    PreparedDataset,
    TrainingNetwork,
    build_feature_cache,
    make_batches,
    prepare_dataset,
    prepare_network,
)
from finetune.training.trainer import fit, predict
from models.artifacts.predictions import cross_entropy
from models.artifacts.statistics import mcnemar_p_value
from models.networks.registry import get_spec

PLAIN, WEIGHTS = "plain", "--class-weights balanced"
ALL_CORRECTED = f"{WEIGHTS}, all corrected"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    WEIGHTS: {"class_weights": "balanced"},
    "--sampling balanced": {"sampling": "balanced"},
    "--class-frequencies equal": {"class_frequencies": "equal"},
    f"{WEIGHTS} --class-frequencies equal": {"class_weights": "balanced", "class_frequencies": "equal"},
    "--sampling balanced --class-frequencies equal": {"sampling": "balanced", "class_frequencies": "equal"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--small", default="dogs", help="the rare class")
    parser.add_argument("--large-photos", type=int, default=500)
    parser.add_argument("--small-photos", type=int, default=25)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    args = parser.parse_args()
    spec = get_spec(args.backbone)
    config = Config(data_dir=args.data, backbone=args.backbone, head="linear", allow_leakage=True, epochs=args.epochs)
    config = config.with_recipe(spec.recipe)
    compute = select_compute("cpu", "fp32")
    dataset = read_dataset(args.data)
    small = dataset.classes.index(args.small)
    network = prepare_network(spec, len(dataset.classes), config, compute)
    cache = build_feature_cache(config, network, compute)
    assert cache is not None
    prepared = prepare_dataset(config, dataset, network, cache)
    sizes = [args.small_photos if label == small else args.large_photos for label in range(2)]
    rows: dict[str, list[list[float]]] = {}
    for draw in range(args.draws):
        drawn = draw_photos(prepared, sizes, seed=draw)
        true = np.array(drawn.labels("test"))
        frequencies = [np.array(sizes) / sum(sizes), np.full(2, 0.5)]
        weights = [(fractions / np.bincount(true))[true] for fractions in frequencies]
        plain = np.zeros(0, dtype=bool)
        for name, way in WAYS.items():
            head, test = train_head(dataclasses.replace(config, **way), network, compute, cache, drawn)
            corrected = {name: head.bias_shift}
            if name == WEIGHTS and head.balance:
                corrected[ALL_CORRECTED] = head.temperature * head.balance.logit_shift
            for title, shift in corrected.items():
                scores = test + shift
                correct = scores.argmax(axis=1) == true
                plain = correct if name == PLAIN else plain
                of_small, of_large = correct[true == small], correct[true != small]
                losses = cross_entropy(true, apply_temperature(scores, head.temperature))
                only_plain, only_own = (int(both[true == small].sum()) for both in (plain & ~correct, correct & ~plain))
                recalls = [of_small.mean(), of_large.mean(), (of_small.mean() + of_large.mean()) / 2]
                p = mcnemar_p_value(only_plain, only_own)
                precisions = [precision(of_small.mean(), of_large.mean(), own[small]) for own in frequencies]
                log_losses = [float(own @ losses) for own in weights]
                rows.setdefault(title, []).append([*recalls, *precisions, *log_losses, p])
    print(
        f"\n{args.backbone}, {args.large_photos} : {args.small_photos} photos, {config.epochs} epochs, evaluated on "
        f"{(true == small).sum()} {args.small} and {(true != small).sum()} others"
    )
    print(
        f"{'':<52} recall of {args.small} in each draw, % | means: {args.small}, others, both | precision of {args.small}: "
        "training, equal | log loss: training, equal | p"
    )
    for name, values in rows.items():
        table = np.array(values)
        each = "  ".join(f"{100 * value:5.1f}" for value in table[:, 0])
        means = table.mean(axis=0)
        p_values = "" if name == PLAIN else "  ".join(f"{p:.2g}" for p in table[:, 7])
        mean_recalls, mean_precisions = (" ".join(f"{100 * value:6.1f}" for value in part) for part in (means[:3], means[3:5]))
        print(f"{name:<52} {each} | {mean_recalls} | {mean_precisions} | {means[5]:.4f} {means[6]:.4f} | {p_values}")


def precision(recall: float, recall_of_others: float, frequency: float) -> float:
    """Compute the precision of one of two classes where this fraction of the photos belongs to it."""
    correct, mistaken = frequency * recall, (1 - frequency) * (1 - recall_of_others)
    return correct / (correct + mistaken)


def draw_photos(prepared: PreparedDataset, sizes: list[int], *, seed: int) -> PreparedDataset:
    """Draw photos of each class for training, a fifth of them for validation. The rest are the split ``test``."""
    rng = np.random.default_rng(seed)
    records = [*prepared.splits["train"], *prepared.splits["valid"]]
    labels = np.array([record.sample.label for record in records])
    splits = np.full(len(records), "test ")
    for label, size in enumerate(sizes):
        drawn = rng.permutation(np.flatnonzero(labels == label))[:size]
        splits[drawn] = "train"
        splits[drawn[: round(size / 5)]] = "valid"
    own = {name.strip(): [records[i] for i in np.flatnonzero(splits == name)] for name in ("train", "valid", "test ")}
    return dataclasses.replace(prepared, splits=own)


def train_head(
    config: Config, network: TrainingNetwork, compute: Compute, cache: FeatureCache, drawn: PreparedDataset
) -> tuple[TrainedHead, NDArray[np.float64]]:
    """Train a head as `finetune train` does. Returns it, and its uncorrected log-probabilities of the test photos."""
    initial = network.trainable_state()
    balance = class_balance(config, drawn.labels("train"), drawn.dataset.classes)
    module = network.split_model.trainable
    train, valid, test = (make_batches(config, network, cache, drawn, split) for split in ("train", "valid", "test"))
    names = list(initial)
    with network.untrained(initial):
        progress = fit(module, names, train, valid, config, compute=compute, head=network.head_names, balance=balance)
        log_probs, labels = predict(module, valid, compute=compute)
        of_test, _ = predict(module, test, compute=compute)
        module.load_state_dict(initial, strict=False)
        held_out = cross_validate_head(config, network, cache, drawn, epochs=progress.best_epoch, compute=compute)
    outputs = Outputs(log_probs.double().numpy(), labels.numpy())
    return TrainedHead(outputs, balance, held_out), of_test.double().numpy()


if __name__ == "__main__":
    main()
