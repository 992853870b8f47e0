"""Class weights and balanced sampling: their values, the draws of an epoch, and the correction of the probabilities."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.compute.device import Compute
from finetune.config import Config
from finetune.evaluation.cross_validation import Outputs
from finetune.evaluation.trained_head import TrainedHead
from finetune.metrics.calibration import apply_temperature
from finetune.training.augmentation import BatchAugment
from finetune.training.class_balance import class_balance, read_class_weights, require_weights_of_classes
from finetune.training.data_loaders import CachedBatches, InMemoryBatches, balanced_draws, epoch_order
from finetune.training.trainer import fit, predict
from models.errors import ConfigError
from models.networks.classifier import build_classifier
from models.networks.head_logits import require_shiftable_logits, shift_logits
from models.networks.registry import get_spec
from tests.helpers.tiny_network import TINY, registered

CLASSES = ("cats", "dogs")
LABELS = [0] * 40 + [1] * 2


def balance_of(
    config: Config, labels: list[int] = LABELS, classes: tuple[str, ...] = CLASSES
) -> tuple[list[float], list[float]]:
    balance = class_balance(config, labels, classes)
    assert balance is not None
    return balance.loss_weights.tolist(), balance.effective_weights.tolist()


# Weights


def test_without_weights_and_sampling_there_is_no_balance() -> None:
    assert class_balance(Config(), LABELS, CLASSES) is None


def test_balanced_weights_are_inverse_to_the_number_of_photos() -> None:
    loss, effective = balance_of(Config(class_weights="balanced"))
    assert loss == pytest.approx([42 / 80, 42 / 4])
    assert effective == pytest.approx(loss)


def test_balanced_sampling_has_the_effect_of_balanced_weights_without_a_weight() -> None:
    loss, effective = balance_of(Config(sampling="balanced"))
    assert loss == [1.0, 1.0]
    assert effective == pytest.approx(balance_of(Config(class_weights="balanced"))[1])


def test_weights_of_a_file_have_a_mean_of_one_over_the_photos() -> None:
    loss, effective = balance_of(Config(class_weights='{"cats": 1, "dogs": 5}'))
    assert loss[1] == pytest.approx(5 * loss[0])
    assert 40 * loss[0] + 2 * loss[1] == pytest.approx(42)
    assert effective == pytest.approx(loss)
    loss, effective = balance_of(Config(class_weights='{"cats": 1, "dogs": 5}', sampling="balanced"))
    assert effective[1] == pytest.approx(100 * effective[0])
    assert 21 * loss[0] + 21 * loss[1] == pytest.approx(42)


def test_a_class_without_training_photos_has_no_correction() -> None:
    balance = class_balance(Config(class_weights="balanced"), [0, 0, 0, 2], ("cats", "cows", "dogs"))
    assert balance is not None
    assert balance.effective_weights.tolist() == pytest.approx([2 / 3, 1.0, 2.0])
    assert balance_of(Config(sampling="balanced"), [0, 0, 0, 2], ("cats", "cows", "dogs"))[1] == pytest.approx([2 / 3, 1, 2])


def test_weights_and_sampling_cannot_both_be_balanced() -> None:
    with pytest.raises(ConfigError, match=r"both make the classes equal, and together favor rare ones\. Use one of them\."):
        Config(class_weights="balanced", sampling="balanced")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weights.json", '{"dogs": 20, "cats": 1}'),
        ("weights.csv", "cats,1\ndogs,20\n"),
        ("weights.csv", "\ufeffclass,weight\r\n\r\ncats,1\r\ndogs,20.0\r\n"),
    ],
)
def test_a_file_of_weights_is_replaced_by_its_contents(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    contents = read_class_weights(str(tmp_path / name))
    assert contents == '{"cats": 1.0, "dogs": 20.0}'
    assert read_class_weights(contents) == contents


def test_class_names_with_commas_and_other_scripts_can_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.csv").write_text('"one, two",2\n猫,3\n', encoding="utf-8")
    assert json.loads(read_class_weights(str(tmp_path / "weights.csv"))) == {"one, two": 2.0, "猫": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cats,1\ndogs,0\n", "the weight of 'dogs' must be a positive number (got '0')."),
        ("cats,1\ndogs,nan\n", "the weight of 'dogs' must be a positive number (got 'nan')."),
        ('{"cats": true}', "the weight of 'cats' must be a positive number (got True)."),
        ('{"cats": 1, "cats": 2}', "the class 'cats' has two weights. Remove one."),
        ('{"cats": 1', "is not valid JSON (Expecting ',' delimiter: line 1 column 11 (char 10)). Write {class: weight}."),
        ("cats,1\ndogs\n", "row 2: expected a class and a weight, got 'dogs'."),
        ("class,weight\n", "contains no weights. Write one row per class, such as `dogs,20`."),
    ],
)
def test_an_invalid_file_of_weights_is_reported(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "weights.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_class_weights(str(file))
    assert str(caught.value).removeprefix(str(file)).lstrip(":, ") == message


def test_a_missing_file_of_weights_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        read_class_weights("balance")
    expected = "--class-weights must be balanced, none or a JSON or CSV file (balance: No such file or directory). "
    expected += "Did you mean 'balanced'?"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ('{"cats": 1}', "have no weight for 'dogs'."),
        ('{"cats": 1, "dogs": 2, "cows": 3}', "name 'cows', which is not a class."),
        ('{"cats": 1, "dog": 2}', "name 'dog', which is not a class. Did you mean 'dogs'?"),
    ],
)
def test_weights_of_other_classes_are_rejected(weights: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_weights_of_classes(Config(class_weights=weights), CLASSES)
    assert str(caught.value) == f"The --class-weights {problem} Give each class one positive weight: cats, dogs."


# Sampling


def test_a_balanced_epoch_draws_the_classes_equally_and_repeats_photos_evenly() -> None:
    labels = torch.tensor([0] * 50 + [1] * 4 + [3] * 6)
    order = epoch_order(labels, 3, 0, balanced=True)
    images = (order % 60).tolist()
    assert Counter(labels[images].tolist()) == {0: 20, 1: 20, 3: 20}
    times = Counter(images)
    assert {times[i] for i in range(50)} == {0, 1}
    assert [times[i] for i in range(50, 54)] == [5] * 4
    assert sorted(times[i] for i in range(54, 60)) == [3, 3, 3, 3, 4, 4]
    assert len(set(order.tolist())) == 60  # each repetition has its own index


def test_balanced_epochs_are_reproducible_and_cover_a_large_class_over_time() -> None:
    labels = torch.tensor(LABELS)
    orders = [epoch_order(labels, 3, epoch, balanced=True).tolist() for epoch in range(12)]
    assert orders[:2] == [epoch_order(labels, 3, epoch, balanced=True).tolist() for epoch in range(2)]
    assert orders[0] != orders[1]
    assert {index % 42 for order in orders for index in order} == set(range(42))


@pytest.mark.parametrize(("counts", "draws"), [([5, 3], [4, 4]), ([4, 3], [4, 3]), ([7, 0, 3], [5, 0, 5]), ([0], [0])])
def test_draws_add_up_to_the_number_of_photos(counts: list[int], draws: list[int]) -> None:
    assert balanced_draws(counts) == draws


def test_cached_batches_of_a_balanced_epoch_have_the_features_of_their_labels() -> None:
    features = np.array(LABELS, dtype=np.float32)[:, None]
    batches = CachedBatches(features, LABELS, batch_size=8, seed=0, balanced=True)
    drawn = list(batches.shuffled(0))
    assert all(torch.equal(rows[:, 0], labels.float()) for rows, labels in drawn)
    assert sum(int(labels.sum()) for _, labels in drawn) == 21
    plain = list(batches.with_sampling(balanced=False).shuffled(0))
    assert sum(int(labels.sum()) for _, labels in plain) == 2


# Training and the correction


def gaussian_features(counts: tuple[int, int], *, seed: int) -> tuple[np.ndarray, list[int]]:
    """Two overlapping classes: the log odds of the second are 2 x + log(prior odds)."""
    rng = np.random.default_rng(seed)
    labels = [0] * counts[0] + [1] * counts[1]
    return (rng.normal(size=len(labels)) + 2.0 * np.array(labels) - 1.0).astype(np.float32)[:, None], labels


def fitted(config: Config, features: np.ndarray, labels: list[int]) -> tuple[nn.Module, TrainedHead]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 2), nn.LogSoftmax(dim=1))
    balanced = config.sampling == "balanced"
    batches = CachedBatches(features, labels, batch_size=250, seed=0, balanced=balanced)
    compute = Compute(torch.device("cpu"), "fp32")
    balance = class_balance(config, labels, CLASSES)
    names = ["0.weight", "0.bias"]
    fit(module, names, batches, batches, config, compute=compute, head=names, balance=balance)
    log_probs, true = predict(module, batches, compute=compute)
    return module, TrainedHead(Outputs(log_probs.double().numpy(), true.numpy()), balance)


SETTINGS = {"epochs": 30, "batch_size": 250, "optimizer": "adam", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "how", [{"class_weights": "balanced"}, {"sampling": "balanced"}, {"class_weights": '{"cats": 1, "dogs": 9}'}]
)
def test_corrected_probabilities_are_those_of_the_true_frequencies(how: dict[str, str]) -> None:
    """Weighted training moves the probabilities of the rare class far up; the correction moves them back to the truth.

    The head has converged, so that nearly the complete weights are corrected.
    """
    features, labels = gaussian_features((4500, 500), seed=1)
    config = Config(**SETTINGS, lr_schedule="cosine", **how)  # type: ignore[arg-type]
    _, head = fitted(config, features, labels)
    true = 1 / (1 + np.exp(-(2 * features[:, 0] + np.log(500 / 4500))))
    weighted = apply_temperature(head.outputs.log_probs, 1.0)[:, 1]
    corrected = apply_temperature(head.scores, head.temperature)[:, 1]
    assert head.correction == pytest.approx(1.0, abs=0.1)
    assert np.abs(weighted - true).mean() > 0.15
    assert np.abs(corrected - true).mean() < 0.02
    assert corrected.mean() == pytest.approx(0.1, abs=0.01)


def test_equal_frequencies_give_the_probabilities_of_equally_frequent_classes() -> None:
    features, labels = gaussian_features((4500, 500), seed=1)
    config = Config(**SETTINGS, lr_schedule="cosine", class_frequencies="equal")  # type: ignore[arg-type]
    _, head = fitted(config, features, labels)
    assert head.balance is not None
    assert head.balance.effective_weights.tolist() == [1.0, 1.0]
    true = 1 / (1 + np.exp(-2 * features[:, 0]))
    assert np.abs(apply_temperature(head.scores, head.temperature)[:, 1] - true).mean() < 0.02


def test_a_head_that_ignored_its_weights_is_not_corrected() -> None:
    """A correction by the weights alone would then be wrong. The held-out photos decide how much is needed."""
    rng = np.random.default_rng(4)
    log_odds = rng.normal(-2.2, 2.0, 4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    log_probs = np.stack([-np.logaddexp(0, log_odds), -np.logaddexp(0, -log_odds)], axis=1)
    balance = class_balance(Config(class_weights="balanced"), labels.tolist(), CLASSES)
    head = TrainedHead(Outputs(log_probs, labels), balance)
    assert head.correction == pytest.approx(0.0, abs=0.05)
    assert head.temperature == pytest.approx(1.0, abs=0.1)


def test_held_out_outputs_decide_if_there_are_any() -> None:
    rng = np.random.default_rng(4)
    log_probs = np.log(rng.dirichlet([1, 1], 300))
    balance = class_balance(Config(class_weights="balanced"), LABELS, CLASSES)
    confused = Outputs(log_probs, rng.integers(2, size=300))
    right = Outputs(log_probs, log_probs.argmax(axis=1))
    assert TrainedHead(right, balance, confused).temperature > 2 > TrainedHead(right, balance).temperature


def test_integer_weights_equal_repeated_photos() -> None:
    """With one batch per epoch, a weight of 3 is the same as three copies."""
    features, labels = gaussian_features((30, 10), seed=2)
    copies = np.concatenate([features, features[30:], features[30:]])
    settings = SETTINGS | {"epochs": 5, "batch_size": 250}
    weighted, _ = fitted(Config(**settings, lr_schedule="constant", class_weights='{"cats": 1, "dogs": 3}'), features, labels)  # type: ignore[arg-type]
    repeated, _ = fitted(Config(**settings, lr_schedule="constant"), copies, labels + [1] * 20)  # type: ignore[arg-type]
    for ours, theirs in zip(weighted.parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_validation_is_weighted_as_training_is() -> None:
    features, labels = gaussian_features((40, 2), seed=3)
    config = Config(**SETTINGS | {"epochs": 1}, lr_schedule="constant", class_weights="balanced")  # type: ignore[arg-type]
    module = nn.Sequential(nn.Linear(1, 2), nn.LogSoftmax(dim=1))
    batches = CachedBatches(features, labels, batch_size=250, seed=0)
    balance = class_balance(config, labels, CLASSES)
    names = ["0.weight", "0.bias"]
    compute = Compute(torch.device("cpu"), "fp32")
    row = fit(module, names, batches, batches, config, compute=compute, head=names, balance=balance).history[0]
    log_probs, true = predict(module, batches, compute=compute)
    losses = -log_probs[torch.arange(42), true]
    assert row["valid_loss"] == pytest.approx(float((losses[:40].mean() + losses[40:].mean()) / 2), rel=1e-5)
    correct = (log_probs.argmax(1) == true).float()
    assert row["valid_accuracy"] == pytest.approx(float((correct[:40].mean() + correct[40:].mean()) / 2), rel=1e-5)


# The bias


def tiny_pixels(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_shift_of_the_bias_is_a_shift_of_the_logits() -> None:
    with registered():
        classifier = build_classifier(TINY, num_classes=3, base=None)
    before = {name: tensor.clone() for name, tensor in classifier.net.state_dict().items()}
    require_shiftable_logits(classifier, TINY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.net.state_dict().items())
    shift = torch.tensor([0.5, -2.0, 1.0])
    with torch.no_grad():
        expected = torch.log_softmax(classifier(tiny_pixels()) + shift, dim=1)
        shift_logits(classifier.net, TINY.heads, shift)
        torch.testing.assert_close(classifier(tiny_pixels()), expected)


def test_a_network_that_clips_its_logits_is_rejected() -> None:
    spec = get_spec("squeezenet1_1")
    with pytest.raises(ConfigError) as caught:
        require_shiftable_logits(build_classifier(spec, num_classes=2, base=None), spec)
    assert str(caught.value) == (
        "--class-weights, --sampling and --class-frequencies need a network whose last layer outputs the logits, and that of "
        "squeezenet1_1 does not. Choose another network with --backbone."
    )


class _Identity:
    """Frozen layers that return the pixels."""

    def run(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.astype(np.float32)


def test_repeated_photos_in_memory_have_different_views() -> None:
    """A photo of a rare class that is drawn again in an epoch is cropped and flipped differently."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    labels = [0] * 8 + [1] * 2
    frozen: Any = _Identity()

    def drawn(augment: BatchAugment | None, *, balanced: bool) -> dict[int, list[bytes]]:
        batches = InMemoryBatches(pixels, labels, frozen=frozen, augment=augment, batch_size=4, seed=0, balanced=balanced)
        views: dict[int, list[bytes]] = {0: [], 1: []}
        for rows, own in batches.shuffled(0):
            for row, label in zip(rows.numpy(), own.tolist(), strict=True):
                views[label].append(row.tobytes())
        return views

    assert len(set(drawn(None, balanced=True)[1])) == 2
    views = drawn(BatchAugment(0), balanced=True)
    assert [len(views[label]) for label in (0, 1)] == [5, 5]
    assert len(set(views[1])) == 5
    assert len(set(drawn(BatchAugment(0), balanced=False)[1])) == 2
