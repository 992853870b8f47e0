"""Train the last layer of a network by logistic regression on the embeddings of its frozen layers."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune.compute import distributed
from finetune.compute.device import Compute
from finetune.config import Config
from finetune.training.class_balance import ClassBalance
from finetune.training.data_loaders import Batches
from finetune.training.logistic_regression import (
    LogisticRegression,
    PenaltySelection,
    fit_logistic_regression,
    select_penalty,
)
from finetune.training.scaled_embeddings import scale_embeddings
from finetune.training.setup import TrainingNetwork
from finetune.training.trainer import Progress, loss_and_accuracy, predict, predict_with_embeddings
from models.errors import ConfigError


def fit_logistic(
    network: TrainingNetwork,
    train: Batches,
    valid: Batches,
    config: Config,
    *,
    compute: Compute,
    groups: NDArray[np.int64],
    balance: ClassBalance | None = None,
    progress: Progress | None = None,
    title: str = "",
    on_epoch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Fit the head and evaluate it. The result has one row of history, and is the state to resume from.

    Args:
        network: The network. Its head has the fitted weights afterwards.
        train: The training batches.
        valid: The validation batches.
        config: The settings of the run.
        compute: Device and precision.
        groups: The number of each training image's group, (N,).
        balance: The weights of the classes.
        progress: The saved state of a fitted head.
        title: Begins the line of results.
        on_epoch: Called with the state once the head is fitted.
    """
    module = network.split_model.trainable
    if progress and progress.epoch:
        module.load_state_dict(progress.best, strict=False)
        module.to(compute.device)
        return progress
    started = time.perf_counter()
    selection = fit_head_once(network, train, config, compute=compute, groups=groups, balance=balance)
    predicted = {split: predict(module, batches, compute=compute) for split, batches in (("train", train), ("valid", valid))}
    train_loss, train_accuracy = distributed.broadcast(loss_and_accuracy(*predicted["train"], balance=balance))
    valid_loss, valid_accuracy = distributed.broadcast(loss_and_accuracy(*predicted["valid"], balance=balance))
    row = {
        "epoch": 1,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "valid_loss": valid_loss,
        "valid_accuracy": valid_accuracy,
        "penalty": selection.penalty,
        "seconds": time.perf_counter() - started,
    }
    print(
        f"{title}penalty {selection.penalty:.3g}: train loss {train_loss:.4f}, valid loss {valid_loss:.4f}, "
        f"valid accuracy {valid_accuracy:.2%}",
        flush=True,
    )
    head = {name: tensor.cpu() for name, tensor in network.trainable_state().items()}
    progress = Progress(epoch=1, last=head, best=head, best_epoch=1, best_loss=valid_loss, history=[row])
    on_epoch(progress)
    return progress


def fit_head_once(
    network: TrainingNetwork,
    train: Batches,
    config: Config,
    *,
    compute: Compute,
    groups: NDArray[np.int64],
    balance: ClassBalance | None = None,
) -> PenaltySelection:
    """Fit the head to the training images, and select the penalty if the settings have none. See ``fit_logistic``.

    Raises:
        ConfigError: The network has several embeddings per image.
    """
    module = network.split_model.trainable
    module.to(compute.device)
    head = network.classifier.net.get_submodule(network.spec.head)
    assert isinstance(head, nn.Linear), "prepare_network rejects other heads"
    _, image_labels, embeddings = predict_with_embeddings(network, train, compute=compute)
    if embeddings.ndim > 2:
        raise ConfigError(
            f"--head logistic needs one embedding per image, and {network.spec.name} has several. Use --head linear."
        )
    labels = image_labels.numpy()

    def fit() -> tuple[PenaltySelection, LogisticRegression]:
        vectors, divisor = scale_embeddings(embeddings, config.normalization)
        weights = balance.effective_weights[labels] if balance else None
        selection = (
            select_penalty(vectors, labels, groups, num_classes=head.out_features, weights=weights, seed=config.seed)
            if config.penalty is None
            else PenaltySelection(config.penalty, {})
        )
        fitted = fit_logistic_regression(
            vectors, labels, num_classes=head.out_features, penalty=selection.penalty, weights=weights
        )
        return selection, LogisticRegression(fitted.weight / divisor, fitted.bias)

    selection, fitted = distributed.run_on_main(fit)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fitted.weight))
        head.bias.copy_(torch.from_numpy(fitted.bias))
    return selection
