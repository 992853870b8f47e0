"""Train the layers after the split point in the way that the settings choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from finetune.compute.device import Compute
from finetune.config import Config
from finetune.training.class_balance import ClassBalance
from finetune.training.data_loaders import Batches
from finetune.training.logistic_head import fit_logistic
from finetune.training.setup import PreparedDataset, TrainingNetwork
from finetune.training.trainer import Progress, fit
from models.networks.spec import LOGISTIC


def train_head(
    network: TrainingNetwork,
    batches: Mapping[str, Batches],
    config: Config,
    prepared: PreparedDataset,
    *,
    compute: Compute,
    balance: ClassBalance | None = None,
    progress: Progress | None = None,
    title: str = "",
    on_epoch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train in epochs, or by logistic regression. See ``fit`` and ``fit_logistic``.

    Args:
        network: The network. It has the weights of the best epoch afterwards.
        batches: The batches of ``train`` and ``valid``.
        config: The settings of the run.
        prepared: The dataset.
        compute: Device and precision.
        balance: The weights of the classes.
        progress: The state to resume from.
        title: Begins each line of progress.
        on_epoch: Called with the state to resume from.
    """
    if config.head == LOGISTIC:
        return fit_logistic(
            network,
            batches["train"],
            batches["valid"],
            config,
            compute=compute,
            groups=prepared.groups("train"),
            balance=balance,
            progress=progress,
            title=title,
            on_epoch=on_epoch,
        )
    return fit(
        network.split_model.trainable,
        [f"net.{name}" for name in network.trainable_names],
        batches["train"],
        batches["valid"],
        config,
        compute=compute,
        head=network.head_names,
        aux_weight=network.classifier.aux_weight,
        balance=balance,
        progress=progress,
        title=title,
        on_epoch=on_epoch,
    )
