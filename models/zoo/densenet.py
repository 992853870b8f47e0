"""DenseNet (2016): each layer gets the feature maps of all preceding layers in its block.

Huang, Liu, van der Maaten and Weinberger 2016, "Densely Connected Convolutional Networks" (https://arxiv.org/abs/1608.06993).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torchvision import models as torchvision_models

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import Cost, ModelSpec, WeightsSource


def rename_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the published file, which has older names: ``norm.1.weight`` is now ``norm1.weight``."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): tensor for name, tensor in tensors.items()}


DENSENET121 = ModelSpec(
    name="densenet121",
    title="DenseNet-121",
    year=2016,
    paper="https://arxiv.org/abs/1608.06993",
    head="classifier",
    cam_layer="features",
    weights=WeightsSource.torchvision("densenet121-a639ec97.pth", convert=rename_keys),
    cost=Cost(7_978_856, 2_834_161_664),
)


@register_model(DENSENET121)
def densenet121(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build four dense blocks of 6, 12, 24 and 16 layers.

    Each layer adds 32 feature maps. Each transition halves the number of maps and their size.

    images        (N, 3, 224, 224)
    stem          conv 7x7/2 64, max pool -> (N, 64, 56, 56)
    denseblock1   (N, 256, 56, 56)    transition -> (N, 128, 28, 28)
    denseblock2   (N, 512, 28, 28)    transition -> (N, 256, 14, 14)
    denseblock3   (N, 1024, 14, 14)   transition -> (N, 512, 7, 7)
    denseblock4   (N, 1024, 7, 7)
    classifier    average pool, 1024 -> num_classes
    """
    return adapt_in_channels(torchvision_models.densenet121(num_classes=num_classes), in_channels)
