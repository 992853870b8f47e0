"""VGG: the same 3x3 convolution, over and over (Simonyan and Zisserman 2014, arXiv 1409.1556)."""

from __future__ import annotations

from torch import nn
from torchvision import models as torchvision_models

from models.registry import register_model
from models.spec import ModelSpec, WeightsSource

VGG16 = ModelSpec(
    name="vgg16",
    title="VGG16",
    year=2014,
    paper="https://arxiv.org/abs/1409.1556",
    head="classifier.6",
    cam_layer="features.29",
    weights=WeightsSource(
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        licence="BSD-3-Clause",
    ),
)


@register_model(VGG16)
def vgg16(num_classes: int) -> nn.Module:
    """Five stages of 3x3 convolutions, each halved by max pooling, then three fully connected layers.

    images       (N, 3, 224, 224)
    features     2 x conv 64,  pool -> (N, 64, 112, 112)
                 2 x conv 128, pool -> (N, 128, 56, 56)
                 3 x conv 256, pool -> (N, 256, 28, 28)
                 3 x conv 512, pool -> (N, 512, 14, 14)
                 3 x conv 512, pool -> (N, 512, 7, 7)
    classifier   25088 -> 4096 -> 4096 -> num_classes, dropout between them
    """
    return torchvision_models.vgg16(num_classes=num_classes)
