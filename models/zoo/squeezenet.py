"""SqueezeNet (2016): AlexNet's accuracy with 50 times fewer parameters.

Iandola et al. 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size"
(https://arxiv.org/abs/1602.07360).
"""

from __future__ import annotations

from torch import nn
from torchvision import models as torchvision_models

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import Cost, ModelSpec, WeightsSource

SQUEEZENET1_1 = ModelSpec(
    name="squeezenet1_1",
    title="SqueezeNet 1.1",
    year=2016,
    paper="https://arxiv.org/abs/1602.07360",
    head="classifier.1",  # a 1x1 convolution that classifies each position; its outputs are averaged
    cam_layer="features",
    weights=WeightsSource.torchvision("squeezenet1_1-b8a52dc0.pth"),
    cost=Cost(1_235_496, 349_151_936),
)


@register_model(SQUEEZENET1_1)
def squeezenet1_1(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build fire modules, which squeeze with 1x1 convolutions and expand with parallel 1x1 and 3x3 convolutions.

    images       (N, 3, 224, 224)
    stem         conv 3x3/2 64, max pool -> (N, 64, 55, 55)
    fire         2 x -> (N, 128, 55, 55), max pool -> (N, 128, 27, 27)
                 2 x -> (N, 256, 27, 27), max pool -> (N, 256, 13, 13)
                 4 x -> (N, 512, 13, 13)
    classifier   dropout, conv 1x1 -> (N, num_classes, 13, 13), ReLU, average pool
    """
    return adapt_in_channels(torchvision_models.squeezenet1_1(num_classes=num_classes), in_channels)
