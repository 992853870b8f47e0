"""AlexNet in its one-tower form (Krizhevsky 2014, "One weird trick", arXiv 1404.5997)."""

from __future__ import annotations

from torch import nn
from torchvision import models as torchvision_models

from models.registry import register_model
from models.spec import ModelSpec, WeightsSource

ALEXNET = ModelSpec(
    name="alexnet",
    title="AlexNet",
    year=2014,
    paper="https://arxiv.org/abs/1404.5997",
    head="classifier.6",
    cam_layer="features.11",
    weights=WeightsSource(
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", sha256="7be5be79", licence="BSD-3-Clause"
    ),
)


@register_model(ALEXNET)
def alexnet(num_classes: int) -> nn.Module:
    """Five convolutions, the first ones large, and three fully connected layers.

    images       (N, 3, 224, 224)
    features     conv 11x11/4 64, pool  -> (N, 64, 27, 27)
                 conv 5x5 192, pool     -> (N, 192, 13, 13)
                 conv 3x3 384, 256, 256 -> (N, 256, 13, 13), pool -> (N, 256, 6, 6)
    classifier   dropout, 9216 -> 4096, dropout, 4096 -> 4096 -> num_classes
    """
    return torchvision_models.alexnet(num_classes=num_classes)
