"""The outputs of a trained head, corrected for class weights, and the comparison of a plain with a balanced head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.compute.device import Compute
from finetune.config import EQUAL, NONE, TRAINING, Config
from finetune.evaluation.cross_validation import Outputs, cross_validate_head
from finetune.features.cache import FeatureCache
from finetune.metrics.calibration import fit_balanced_temperature, fit_temperature
from finetune.metrics.head_comparison import compare_heads
from finetune.training.class_balance import ClassBalance, class_balance
from finetune.training.data_loaders import Batches, CachedBatches
from finetune.training.head import train_head
from finetune.training.setup import PreparedDataset, TrainingNetwork
from finetune.training.trainer import predict


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A trained network's outputs for the validation images.

    Attributes:
        outputs: The outputs before the weights of the classes are corrected.
        balance: The weights of the classes in training.
        held_out: Out-of-fold outputs for the training and validation images, if the head was cross-validated.
        is_refit: Whether the head was fitted to the validation images as well. Its own outputs for them say nothing then.
    """

    outputs: Outputs
    balance: ClassBalance | None = None
    held_out: Outputs | None = None
    is_refit: bool = False

    @property
    def evaluated(self) -> Outputs:
        """The outputs that the head is evaluated and calibrated with: for the validation images, or out of fold."""
        return self.held_out if self.held_out and self.is_refit else self.outputs

    @property
    def temperature(self) -> float:
        """The calibration temperature."""
        return self._calibration[0]

    @property
    def bias_shift(self) -> NDArray[np.float64]:
        """What to add to the bias of the head to correct its class weights, (classes,).

        Calibration divides the logits by the temperature, so that the correction is multiplied by it.
        """
        temperature, fraction = self._calibration
        shift = np.zeros(self.outputs.log_probs.shape[1]) if self.balance is None else self.balance.logit_shift
        return temperature * fraction * shift

    @property
    def correction(self) -> float:
        """The fraction of the class weights that is corrected, from 0 to 1."""
        return self._calibration[1]

    @property
    def scores(self) -> NDArray[np.float64]:
        """Logits of the corrected network up to a constant per evaluated image, (N, classes)."""
        return self.evaluated.log_probs + self.bias_shift

    @property
    def predicted(self) -> NDArray[np.int64]:
        return np.asarray(self.scores.argmax(axis=1), dtype=np.int64)

    @cached_property
    def _calibration(self) -> tuple[float, float]:
        """The temperature and the fraction of the correction."""
        if self.balance is None:
            return fit_temperature(self.evaluated.log_probs, self.evaluated.labels), 0.0
        unseen = self.held_out or self.outputs
        shift, frequencies = self.balance.logit_shift, self.balance.frequencies
        return fit_balanced_temperature(unseen.log_probs, unseen.labels, shift=shift, frequencies=frequencies)


def train_other_head(
    config: Config,
    network: TrainingNetwork,
    compute: Compute,
    batches: Mapping[str, Batches],
    cache: FeatureCache,
    prepared: PreparedDataset,
    *,
    outputs: Outputs,
    epochs: int,
) -> TrainedHead:
    """Return the head for equal class frequencies if that of the run is plain, else a plain one, on the same features.

    The class frequencies only shift the logits. The other head is therefore trained only if the run has class weights or
    balanced sampling.

    Args:
        config: The settings of the run.
        network: The network with its initial weights.
        compute: Device and precision.
        batches: The batches of the run, of cached features.
        cache: The cached features.
        prepared: The dataset.
        outputs: The outputs of the run's own head for the validation images, before the class weights are corrected.
        epochs: The best epoch of the run.

    Raises:
        DataError: The head is refit, and the images cannot be divided into folds.
    """
    is_weighted = not config.class_weights == config.sampling == NONE
    is_plain = not is_weighted and config.class_frequencies == TRAINING
    config = dataclasses.replace(config, class_weights=NONE, sampling=NONE, class_frequencies=EQUAL if is_plain else TRAINING)
    balance = class_balance(config, prepared.labels("train"), prepared.dataset.classes)
    if is_weighted and not config.refit:
        print("Training a plain head for comparison, as the classes are unequal.")
        train = batches["train"]
        assert isinstance(train, CachedBatches)
        batches = {"train": train.with_sampling(balanced=False), "valid": batches["valid"]}
        train_head(network, batches, config, prepared, compute=compute, balance=balance, title="comparison, ")
        log_probs, labels = predict(network.split_model.trainable, batches["valid"], compute=compute)
        outputs = Outputs(log_probs.double().numpy(), labels.numpy())
    if balance is None and not config.refit:
        return TrainedHead(outputs)
    held_out = cross_validate_head(config, network, cache, prepared, epochs=epochs, compute=compute)
    return TrainedHead(outputs, balance, held_out, is_refit=bool(config.refit))


def describe_balance(head: TrainedHead, other: TrainedHead | None, classes: Sequence[str]) -> dict[str, Any] | None:
    """Describe the weights of the classes and the comparison with a head that was trained the other way, for the manifest."""
    if head.balance is None and other is None:
        return None
    description: dict[str, Any] = {"weights": None, "correction": head.correction, "comparison": None}
    if head.balance:
        description["weights"] = dict(zip(classes, head.balance.effective_weights.tolist(), strict=True))
    if other:
        plain, balanced = (head, other) if head.balance is None else (other, head)
        description["comparison"] = compare_heads(head.evaluated.labels, plain.predicted, balanced.predicted, classes=classes)
    return description
