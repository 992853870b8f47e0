"""The training loop for the layers after the split point: NLLLoss, SGD or Adam, best epoch by validation loss."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from finetune.compute import distributed
from finetune.compute.device import Compute
from finetune.config import Config
from finetune.data.embeddings import capture_embeddings
from finetune.training.class_balance import ClassBalance
from finetune.training.data_loaders import Batches
from finetune.training.setup import TrainingNetwork
from models.errors import ConfigError, RunError
from models.networks.split_point import train_mode

EpochRow = dict[str, float]
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass
class Progress:
    """The complete state of a training run after ``epoch`` epochs, including the best epoch so far.

    ``valid_predicted`` has the classes (N,) that the last epoch predicts for the validation images.
    """

    epoch: int = 0
    last: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[EpochRow] = field(default_factory=list)
    valid_predicted: Tensor | None = None


def fit(
    module: nn.Module,
    names: Sequence[str],
    train: Batches,
    valid: Batches,
    config: Config,
    *,
    compute: Compute,
    head: Sequence[str],
    aux_weight: float = 0.0,
    balance: ClassBalance | None = None,
    progress: Progress | None = None,
    title: str = "",
    on_epoch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train ``module`` (features -> log-probabilities) and leave it in the state of its best epoch.

    All random numbers depend only on the seed and the epoch, so a resumed run gives the same weights bit for bit.

    Args:
        module: The layers to train. If it returns a tuple, the outputs after the first are those of auxiliary heads.
        names: The tensors of ``module`` that training changes.
        train: The training batches.
        valid: The validation batches.
        config: The settings of the run.
        compute: Device and precision.
        head: The tensors among ``names`` that learn at the full learning rate.
        aux_weight: Weight of the loss of each auxiliary head.
        balance: The weights of the classes, which also apply to the validation loss and to the accuracies.
        progress: The state to resume from.
        title: Begins each line of progress.
        on_epoch: Called after each epoch with the state to resume from.

    Returns:
        The state after the last epoch.

    Raises:
        RunError: The loss is not finite.
        ConfigError: The network needs larger batches.
    """
    epochs = _known(config.epochs)
    progress = progress or Progress()
    prepare_module(module, config, compute)
    optimizer = make_optimizer(module, config, head=head)
    if progress.epoch:
        module.load_state_dict(progress.last, strict=False)
        optimizer.load_state_dict(progress.optimizer)
    distributed.broadcast_weights(module)
    if min(_known(config.batch_size), len(train)) < _min_batch(module):
        raise ConfigError(
            f"This network has BatchNorm layers to train, which need at least 2 photos per batch (got --batch-size "
            f"{config.batch_size} and {len(train):,} training photos)."
        )
    with tqdm(total=epochs * len(train), initial=progress.epoch * len(train), bar_format=BAR_FORMAT, disable=None) as bar:
        while progress.epoch < epochs and not _should_stop(progress, config):
            started = time.perf_counter()
            bar.set_description(f"{title}epoch {progress.epoch + 1} of {epochs}")
            rate = learning_rate(config, progress.epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            torch.manual_seed(config.seed * 1_000_003 + progress.epoch)
            train_loss, train_accuracy = train_one_epoch(
                module, train, optimizer, progress.epoch, compute=compute, aux_weight=aux_weight, balance=balance, bar=bar
            )
            log_probs, labels = predict(module, valid, compute=compute)
            valid_loss, valid_accuracy = distributed.broadcast(loss_and_accuracy(log_probs, labels, balance=balance))
            if not math.isfinite(train_loss + valid_loss):
                raise RunError(f"The loss became NaN or infinite in epoch {progress.epoch + 1}. Lower --lr (now {rate:g}).")
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
            progress.valid_predicted = log_probs.argmax(1)
            progress.last = _pick(module, names)
            progress.optimizer = copy.deepcopy(optimizer.state_dict())
            if valid_loss < progress.best_loss - config.min_delta:
                progress.best, progress.best_epoch, progress.best_loss = progress.last, progress.epoch, valid_loss
            result = f"train loss {train_loss:.4f}, valid loss {valid_loss:.4f}, valid accuracy {valid_accuracy:.2%}"
            bar.set_postfix_str(result)
            if bar.disable:  # not a terminal: print a line per epoch instead
                print(f"{title}epoch {progress.epoch} of {epochs}: {result}", flush=True)
            on_epoch(progress)
    module.to(memory_format=torch.contiguous_format)
    module.load_state_dict(progress.best, strict=False)
    return progress


def prepare_module(module: nn.Module, config: Config, compute: Compute) -> nn.Module:
    """Move a module to the device. If all layers are trained, store the filters channels last, as convolutions need them."""
    module.to(compute.device)
    if config.weights == "none" and distributed.world_size() == 1:  # gloo requires contiguous tensors
        module.to(memory_format=torch.channels_last)
    return module


def make_optimizer(module: nn.Module, config: Config, *, head: Sequence[str]) -> torch.optim.Optimizer:
    """Create SGD or Adam with the head at the full learning rate and unfrozen layers at ``unfreeze_lr_scale`` of it."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in set(head)], "scale": 1.0},
        {"params": [p for name, p in trainable if name not in set(head)], "scale": config.unfreeze_lr_scale},
    ]
    if config.weights == "none":
        groups = [{"params": [p for _, p in trainable], "scale": 1.0}]
    groups = [group for group in groups if group["params"]]
    rate, decay = _known(config.lr), _known(config.weight_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, lr=rate, momentum=_known(config.momentum), weight_decay=decay, fused=True)


def train_one_epoch(
    module: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    *,
    compute: Compute,
    aux_weight: float = 0.0,
    balance: ClassBalance | None = None,
    bar: Any,
) -> tuple[float, float]:
    """Train for one epoch and return the mean loss and the accuracy, both weighted by class and measured during the epoch."""
    train_mode(module)
    weights = balance.loss_weights.to(compute.device) if balance else None
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    loss_of = nn.NLLLoss(weights, reduction="sum")  # divided by the size of the batch, not by the sum of its weights
    loss_sum, correct = 0.0, 0.0
    for features, labels in batches.shuffled(epoch, min_batch=_min_batch(module)):
        features, labels = features.to(compute.device), labels.to(compute.device)
        count = distributed.all_reduce_sum(len(labels))  # size of the batch over all processes; a shard may be empty
        optimizer.zero_grad()
        if len(labels):
            with compute.autocast(), distributed.shared_dropout(count):
                log_probs, *aux = _as_tuple(module(features))
            loss = loss_of(log_probs.float(), labels)
            aux_loss = sum(loss_of(output.float(), labels) for output in aux)
            scaler.scale((loss + aux_weight * aux_loss) / count).backward()
            loss_sum += loss.item()
            is_correct = (log_probs.argmax(1) == labels).float()
            correct += float((is_correct if weights is None else is_correct * weights[labels]).sum())
        distributed.all_reduce_gradients(module)
        scaler.step(optimizer)
        scaler.update()
        bar.update(count)
    return distributed.all_reduce_sum(loss_sum) / len(batches), distributed.all_reduce_sum(correct) / len(batches)


def loss_and_accuracy(log_probs: Tensor, labels: Tensor, *, balance: ClassBalance | None = None) -> tuple[float, float]:
    """Compute the mean loss and the accuracy of predictions, weighted by class as in training."""
    weights = torch.from_numpy(balance.effective_weights).float() if balance else torch.ones(log_probs.shape[1])
    loss = nn.functional.nll_loss(log_probs, labels, weight=weights).item()
    per_image = weights[labels]
    return loss, float(((log_probs.argmax(1) == labels) * per_image).sum() / per_image.sum())


def predict(module: nn.Module, batches: Batches, *, compute: Compute) -> tuple[Tensor, Tensor]:
    """Predict all batches in evaluation mode.

    Returns:
        Log-probabilities (N, classes) float32 and labels (N,), in the order of the images.
    """
    module.eval()
    outputs: list[Tensor] = []
    label_batches: list[Tensor] = []
    with torch.inference_mode():
        for features, labels in batches.ordered():
            with compute.autocast():
                outputs.append(_as_tuple(module(features.to(compute.device)))[0].float().cpu())
            label_batches.append(labels)
    shards = distributed.all_gather((outputs, label_batches))
    return torch.cat([rows for own, _ in shards for rows in own]), torch.cat([rows for _, own in shards for rows in own])


def predict_with_embeddings(
    network: TrainingNetwork, batches: Batches, *, compute: Compute
) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
    """Predict all batches in evaluation mode.

    Returns:
        Log-probabilities (N, classes) float32, labels (N,) and embeddings (N, ...), the inputs of the head.
    """
    with capture_embeddings(network.classifier, network.spec) as captured:
        log_probs, labels = predict(network.split_model.trainable, batches, compute=compute)
    gathered = [rows for own in distributed.all_gather(captured) for rows in own]
    captured.clear()
    return log_probs, labels, _join(gathered)


def _join(batches: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Concatenate arrays and free each one that is copied, so that there are never two copies of all rows."""
    joined = np.empty((sum(map(len, batches)), *batches[0].shape[1:]), np.float32)
    end = len(joined)
    while batches:
        rows = batches.pop()
        joined[end - len(rows) : end] = rows
        end -= len(rows)
    return joined


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the network's log-probabilities, followed by those of its auxiliary heads if it has any."""
    return output if isinstance(output, tuple) else (output,)


def learning_rate(config: Config, epoch: int) -> float:
    """Return the learning rate of an epoch (from 0): constant, or a half cosine from the full rate toward zero."""
    rate: float = _known(config.lr)
    if config.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * epoch / int(_known(config.epochs))))
    return rate


def _should_stop(progress: Progress, config: Config) -> bool:
    return bool(config.patience) and progress.epoch - progress.best_epoch >= config.patience


def _min_batch(module: nn.Module) -> int:
    """Return 2 if training computes BatchNorm statistics, as those of a single image can be undefined, else 1."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    return 2 if any(p.requires_grad for layer in layers for p in layer.parameters()) else 1


def _pick(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: state[name].detach().cpu().clone() for name in names}


def _known(value: Any) -> Any:
    assert value is not None, "Config.with_recipe fills this in"
    return value
