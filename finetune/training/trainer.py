"""Train what follows the cut: NLLLoss on log-probabilities, SGD or Adam, the best epoch by validation loss kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune.compute import distributed
from finetune.compute.device import Compute
from finetune.config import Config
from finetune.training.data_loaders import Batches
from models.errors import RunError
from models.networks.split_point import train_mode

EpochRow = dict[str, float]


@dataclass
class Progress:
    """All that a training needs to go on: the state after ``epoch`` epochs, and the best one so far."""

    epoch: int = 0
    last: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[EpochRow] = field(default_factory=list)


def fit(
    part: nn.Module,
    names: Sequence[str],
    train: Batches,
    valid: Batches,
    config: Config,
    *,
    compute: Compute,
    head: Sequence[str],
    aux_weight: float = 0.0,
    progress: Progress | None = None,
    on_epoch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train ``part`` (features -> log-probabilities) and give the state of its best epoch.

    ``names`` are the tensors of ``part`` that training changes, ``head`` those among them that learn at the full rate.
    Where ``part`` answers with a tuple, the losses of all answers but the first count ``aux_weight`` each.
    ``on_epoch`` is called after each epoch with what is needed to go on from there: passing it as ``progress`` gives the
    same weights, bit for bit, as if nothing had happened, for every random number is drawn from the seed and the epoch.
    """
    epochs = _known(config.epochs)
    progress = progress or Progress()
    part.to(compute.device)
    optimizer = make_optimizer(part, config, head=head)
    if progress.epoch:
        part.load_state_dict(progress.last, strict=False)
        optimizer.load_state_dict(progress.optimizer)
    distributed.broadcast_weights(part)
    with tqdm(
        total=epochs * len(train), initial=progress.epoch * len(train), desc="training", unit="photo", disable=None
    ) as bar:
        while progress.epoch < epochs and not _should_stop(progress, config):
            started = time.perf_counter()
            rate = learning_rate(config, progress.epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            torch.manual_seed(config.seed * 1_000_003 + progress.epoch)
            train_loss, train_accuracy = train_one_epoch(
                part, train, optimizer, progress.epoch, compute=compute, aux_weight=aux_weight, bar=bar
            )
            valid_loss, valid_accuracy = distributed.broadcast(evaluate(part, valid, compute=compute))
            if not math.isfinite(train_loss + valid_loss):
                raise RunError(f"The loss is no longer a number in epoch {progress.epoch + 1}; lower --lr, which is {rate:g}.")
            progress.epoch += 1
            progress.history.append(
                {
                    "epoch": progress.epoch,
                    "train_loss": train_loss,
                    "train_accuracy": train_accuracy,
                    "valid_loss": valid_loss,
                    "valid_accuracy": valid_accuracy,
                    "learning_rate": rate,
                    "seconds": time.perf_counter() - started,
                }
            )
            progress.last = _pick(part, names)
            progress.optimizer = copy.deepcopy(optimizer.state_dict())
            if valid_loss < progress.best_loss - config.min_delta:
                progress.best, progress.best_epoch, progress.best_loss = progress.last, progress.epoch, valid_loss
            bar.set_postfix(valid_loss=f"{valid_loss:.4f}", valid_accuracy=f"{valid_accuracy:.2%}")
            if bar.disable:  # into a file: no bar, but a line an epoch
                print(
                    f"epoch {progress.epoch} of {epochs}: train loss {train_loss:.4f}, valid loss {valid_loss:.4f}, "
                    f"valid accuracy {valid_accuracy:.2%}",
                    flush=True,
                )
            on_epoch(progress)
    part.load_state_dict(progress.best, strict=False)
    return progress


def make_optimizer(part: nn.Module, config: Config, *, head: Sequence[str]) -> torch.optim.Optimizer:
    """SGD or Adam over what is trainable: the head at the full rate, unfrozen layers at their part of it."""
    trainable = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in set(head)], "scale": 1.0},
        {"params": [p for name, p in trainable if name not in set(head)], "scale": config.unfreeze_lr_scale},
    ]
    if config.weights == "none":
        groups = [{"params": [p for _, p in trainable], "scale": 1.0}]
    groups = [group for group in groups if group["params"]]
    rate, decay = _known(config.lr), _known(config.weight_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, weight_decay=decay)
    return torch.optim.SGD(groups, lr=rate, momentum=_known(config.momentum), weight_decay=decay)


def train_one_epoch(
    part: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    *,
    compute: Compute,
    aux_weight: float = 0.0,
    bar: Any,
) -> tuple[float, float]:
    """One pass in the epoch's order; returns the mean loss and the accuracy, as they were while the weights moved."""
    train_mode(part)
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    loss_of = nn.NLLLoss()
    loss_sum, right = 0.0, 0
    for features, labels in batches.shuffled(epoch):
        features, labels = features.to(compute.device), labels.to(compute.device)
        count = distributed.all_reduce_sum(
            len(labels)
        )  # of the whole batch: several processes have a share of it each, which may be empty
        optimizer.zero_grad()
        if len(labels):
            with compute.autocast(), distributed.shared_dropout(count):
                log_probs, *aux = _answers(part(features))
            loss = loss_of(log_probs.float(), labels)
            aux_loss = sum(loss_of(answer.float(), labels) for answer in aux)
            scaler.scale((loss + aux_weight * aux_loss) * (len(labels) / count)).backward()
            loss_sum += loss.item() * len(labels)
            right += int((log_probs.argmax(1) == labels).sum())
        distributed.all_reduce_gradients(part)
        scaler.step(optimizer)
        scaler.update()
        bar.update(count)
    return distributed.all_reduce_sum(loss_sum) / len(batches), distributed.all_reduce_sum(right) / len(batches)


def evaluate(part: nn.Module, batches: Batches, *, compute: Compute) -> tuple[float, float]:
    """The mean loss and the accuracy in evaluation mode."""
    log_probs, labels = predict(part, batches, compute=compute)
    loss = nn.functional.nll_loss(log_probs, labels).item()
    return loss, float((log_probs.argmax(1) == labels).float().mean())


def predict(part: nn.Module, batches: Batches, *, compute: Compute) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, classes) float32 and labels (N,), in the photos' order, in evaluation mode."""
    part.eval()
    outputs: list[Tensor] = []
    truths: list[Tensor] = []
    with torch.inference_mode():
        for features, labels in batches.ordered():
            with compute.autocast():
                outputs.append(_answers(part(features.to(compute.device)))[0].float().cpu())
            truths.append(labels)
    parts = distributed.all_gather((outputs, truths))
    return torch.cat([rows for own, _ in parts for rows in own]), torch.cat([rows for _, own in parts for rows in own])


def _answers(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The network's own log-probabilities, then those of its auxiliary heads, where it has them."""
    return given if isinstance(given, tuple) else (given,)


def learning_rate(config: Config, epoch: int) -> float:
    """The rate of an epoch (from 0): constant, or half a cosine from the full rate towards zero."""
    rate: float = _known(config.lr)
    if config.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * epoch / int(_known(config.epochs))))
    return rate


def _should_stop(progress: Progress, config: Config) -> bool:
    return bool(config.patience) and progress.epoch - progress.best_epoch >= config.patience


def _pick(part: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    state = part.state_dict()
    return {name: state[name].detach().cpu().clone() for name in names}


def _known(value: Any) -> Any:
    assert value is not None, "Config.with_recipe fills this in"
    return value
