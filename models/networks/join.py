"""Join the embeddings of several pretrained networks as one network: ``efficientnet_lite0+efficientnet_lite2``.

An image is decoded and cropped once, for the network with the largest input. Inside the graph the other networks get their own
crop, resampled from these pixels, so that training and serving see the same. Each embedding is scaled to unit length, and one
head takes all of them. The word ``flip`` in place of a network averages the embeddings of an image and its mirror image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.dropout import _DropoutNd

from models.errors import UnknownModelError
from models.networks.registry import create_model, get_spec
from models.networks.spec import LOGISTIC, ModelSpec, Recipe, WeightsSource
from models.preprocess import INTERPOLATIONS, Preprocessing

SEPARATOR, FLIP = "+", "flip"


class InputView(nn.Module):
    """Convert the normalized pixels of a join to the input of one of its networks.

    Resampling is a product with a constant matrix along each axis, whose result does not depend on the engine.

    Args:
        joined: The preprocessing of the join.
        own: The preprocessing of the network.
    """

    matrix: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, joined: Preprocessing, own: Preprocessing) -> None:
        super().__init__()
        matrix = resampling_matrix(joined, own)
        self.is_resampling = matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix)))
        joined_mean, joined_std, mean, std = (np.array(v) for v in (joined.mean, joined.std, own.mean, own.std))
        self.register_buffer("matrix", torch.tensor(matrix), persistent=False)
        shape = (1, -1, 1, 1)
        self.register_buffer("scale", torch.tensor(joined_std / std).float().reshape(shape), persistent=False)
        self.register_buffer("shift", torch.tensor((joined_mean - mean) / std).float().reshape(shape), persistent=False)
        self.is_rescaling = (joined.mean, joined.std) != (own.mean, own.std)

    def forward(self, images: Tensor) -> Tensor:
        if self.is_rescaling:  # before the product, into which OpenVINO cannot fuse a factor per channel
            images = images * self.scale + self.shift
        return self.matrix @ (images @ self.matrix.T) if self.is_resampling else images


class Join(nn.Module):
    """Networks without their heads on the same images, and one head for all of their embeddings.

    Args:
        networks: Modules that map images to embeddings (N, d).
        views: The input view of each network.
        dimensions: The total length of the embeddings.
        num_classes: The number of outputs.
        flips: Add the embeddings of an image and its mirror image.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        views: Sequence[InputView],
        *,
        dimensions: int,
        num_classes: int,
        flips: bool,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.views = nn.ModuleList(views)
        self.flips = flips
        self.classifier = nn.Linear(dimensions, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        embeddings = []
        for network, view in zip(self.networks, self.views, strict=True):
            own = view(images)
            mirrored = normalize(network(own.flip(3)), dim=1) if self.flips else None
            embedding = normalize(network(own), dim=1)
            embeddings.append(embedding if mirrored is None else normalize(embedding + mirrored, dim=1))
        return self.classifier(torch.cat(embeddings, dim=1))


def join_entry(name: str) -> tuple[ModelSpec, Any]:
    """Return the spec and the builder of a join.

    Raises:
        UnknownModelError: A name is unknown, or the networks cannot be joined.
    """
    *names, last = name.split(SEPARATOR)
    flips = last == FLIP
    parts = tuple(get_spec(part) for part in (names if flips else [*names, last]))
    if len(set(parts)) < len(parts):
        raise UnknownModelError(f"The join {name!r} contains a network twice. Name each network once.")
    for part in parts:
        _require_joinable(part, parts[0])
    preprocessing = joined_preprocessing([part.preprocessing for part in parts])
    largest = max(range(len(parts)), key=lambda i: parts[i].preprocessing.input_px)
    licenses = dict.fromkeys(part.weights.license for part in parts if part.weights)
    locations = " + ".join(part.weights.location for part in parts if part.weights)
    spec = ModelSpec(
        name=name,
        title=" + ".join(part.title for part in parts) + (" with mirror images" if flips else ""),
        year=max((part.year for part in parts if part.year), default=None),
        paper=parts[0].paper,
        head="classifier",
        cam_layer=f"networks.{largest}.{parts[largest].cam_layer}",
        weights=WeightsSource(sha256="", license=" and ".join(licenses), package=locations),
        preprocessing=preprocessing,
        recipe=Recipe(head=LOGISTIC),
        pretrained_classes=parts[0].pretrained_classes,
        parts=parts,
    )

    def join(num_classes: int) -> nn.Module:
        networks, dimensions = [], 0
        for part in parts:
            network = create_model(part.name)
            head = network.get_submodule(part.head)
            if not isinstance(head, nn.Linear):
                raise UnknownModelError(f"{part.name} cannot be joined with other networks: its last layer is not Linear.")
            dimensions += head.in_features
            network.set_submodule(part.head, nn.Identity())
            networks.append(_without_dropout(network))
        views = [InputView(preprocessing, part.preprocessing) for part in parts]
        return Join(networks, views, dimensions=dimensions, num_classes=num_classes, flips=flips)

    return spec, join


def joined_preprocessing(parts: Sequence[Preprocessing]) -> Preprocessing:
    """Return the preprocessing of the largest network, with a crop that contains the crops of all."""
    largest = max(parts, key=lambda part: (part.input_px, part.resize_px))
    widths = [math.ceil(part.input_px * largest.resize_px / part.resize_px) for part in parts]
    wider = max(widths) - largest.input_px
    input_px = min(largest.input_px + wider + wider % 2, largest.resize_px)  # an even margin keeps whole pixels in place
    return dataclasses.replace(largest, input_px=input_px)


def resampling_matrix(joined: Preprocessing, own: Preprocessing) -> NDArray[np.float32]:
    """Return the matrix (own.input_px, joined.input_px) that crops and resizes along one axis as Pillow does."""
    width = own.input_px * joined.resize_px / own.resize_px
    begin = (joined.input_px - width) / 2
    identity = Image.fromarray(np.eye(joined.input_px, dtype=np.float32))
    size, box = (joined.input_px, own.input_px), (0, begin, joined.input_px, begin + width)
    return np.array(identity.resize(size, INTERPOLATIONS[own.interpolation], box))


def _require_joinable(part: ModelSpec, first: ModelSpec) -> None:
    if part.weights is None:
        raise UnknownModelError(f"{part.name} cannot be joined with other networks: it has no pretrained weights.")
    if part.extra_heads:
        raise UnknownModelError(f"{part.name} cannot be joined with other networks: it has several heads.")
    if part.preprocessing.channels != first.preprocessing.channels:
        raise UnknownModelError(f"{part.name} cannot be joined with {first.name}: they differ in the number of channels.")


def _without_dropout(network: nn.Module) -> nn.Module:
    """Turn off random layers, as the embeddings of a join are fixed."""
    for layer in network.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = 0.0
        elif type(layer).__name__ == "StochasticDepth":
            layer.p = 0.0  # type: ignore[assignment]
        elif type(layer).__name__ == "DropPath":
            layer.drop_prob = 0.0  # type: ignore[assignment]
    return network
