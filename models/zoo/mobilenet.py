"""MobileNet: depthwise convolutions for phones (Sandler et al. 2018, arXiv 1801.04381)."""

from __future__ import annotations

from torch import nn
from torchvision import models as torchvision_models

from models.preprocess import Preprocessing
from models.registry import register_model
from models.spec import ModelSpec, WeightsSource

MOBILENET_V2 = ModelSpec(
    name="mobilenet_v2",
    title="MobileNetV2",
    year=2018,
    paper="https://arxiv.org/abs/1801.04381",
    head="classifier.1",
    cam_layer="features",
    # The second set of torchvision's weights: better by 0.3 points than the first, and trained for a resize to 232.
    weights=WeightsSource(
        url="https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth", sha256="7ebf99e0", licence="BSD-3-Clause"
    ),
    preprocessing=Preprocessing(resize_px=232),
)


@register_model(MOBILENET_V2)
def mobilenet_v2(num_classes: int) -> nn.Module:
    """Inverted residuals: expand, filter depthwise, project without an activation.

    images       (N, 3, 224, 224)
    features     stem (N, 32, 112, 112), 17 blocks -> (N, 320, 7, 7), conv 1x1 -> (N, 1280, 7, 7)
    classifier   mean over the map, dropout, 1280 -> num_classes
    """
    return torchvision_models.mobilenet_v2(num_classes=num_classes)
