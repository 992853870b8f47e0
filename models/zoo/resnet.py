"""ResNet: layers that learn what to add to their input (He et al. 2015, arXiv 1512.03385)."""

from __future__ import annotations

from torch import nn
from torchvision import models as torchvision_models

from models.registry import register_model
from models.spec import ModelSpec, WeightsSource

RESNET18 = ModelSpec(
    name="resnet18",
    title="ResNet-18",
    year=2015,
    paper="https://arxiv.org/abs/1512.03385",
    head="fc",
    cam_layer="layer4",
    weights=WeightsSource(
        url="https://download.pytorch.org/models/resnet18-f37072fd.pth", sha256="f37072fd", licence="BSD-3-Clause"
    ),
)


@register_model(RESNET18)
def resnet18(num_classes: int) -> nn.Module:
    """A stem and four stages of two residual blocks each.

    images   (N, 3, 224, 224)
    stem     conv 7x7/2 64, max pool -> (N, 64, 56, 56)
    layer1   (N, 64, 56, 56)    layer2 (N, 128, 28, 28)
    layer3   (N, 256, 14, 14)   layer4 (N, 512, 7, 7)
    fc       mean over the map, 512 -> num_classes
    """
    return torchvision_models.resnet18(num_classes=num_classes)
