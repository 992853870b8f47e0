"""Inception (2014-2016): parallel convolutions of several sizes in one block. ``inception_blocks`` compares the blocks.

- v1: Szegedy et al. 2014, "Going Deeper with Convolutions" (https://arxiv.org/abs/1409.4842).
- v2, v3: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision" (https://arxiv.org/abs/1512.00567),
  factorizes large convolutions into smaller ones.
- v4: Szegedy et al. 2016, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning"
  (https://arxiv.org/abs/1602.07261), has a uniform design with more blocks.

GoogLeNet and Inception v3 are trained with auxiliary heads: intermediate classifiers that bring the gradient to the early
layers and are discarded after training. They are built (``aux=True``) only for training from random weights. Fine-tuning
freezes the early layers, so the auxiliary heads of the published file are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNet
from torchvision.models.inception import Inception3

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import Cost, ModelSpec, WeightsSource
from models.preprocess import Preprocessing

MINUS_ONE_TO_ONE = (0.5, 0.5, 0.5)


def drop_aux_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the tensors of the auxiliary heads."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))}


GOOGLENET = ModelSpec(
    name="googlenet",
    title="GoogLeNet (Inception v1)",
    year=2014,
    paper="https://arxiv.org/abs/1409.4842",
    head="fc",
    cam_layer="inception5b",
    weights=WeightsSource.torchvision("googlenet-1378be20.pth", convert=drop_aux_heads),
    # torchvision converts ImageNet's normalization to TensorFlow's inside the network. Here it is applied directly.
    preprocessing=Preprocessing(mean=MINUS_ONE_TO_ONE, std=MINUS_ONE_TO_ONE),
    aux_weight=0.3,
    cost=Cost(6_624_904, 1_498_376_192),
)
INCEPTION_V3 = ModelSpec(
    name="inception_v3",
    title="Inception v3",
    year=2015,
    paper="https://arxiv.org/abs/1512.00567",
    head="fc",
    cam_layer="Mixed_7c",
    weights=WeightsSource.torchvision("inception_v3_google-0cc3c7bd.pth", convert=drop_aux_heads),
    preprocessing=Preprocessing(input_px=299, resize_px=342, mean=MINUS_ONE_TO_ONE, std=MINUS_ONE_TO_ONE),
    aux_weight=0.4,
    cost=Cost(23_834_568, 5_713_216_096),
)
INCEPTION_V4 = ModelSpec(
    name="inception_v4",
    title="Inception v4",
    year=2016,
    paper="https://arxiv.org/abs/1602.07261",
    head="last_linear",
    cam_layer="features.21",
    weights=WeightsSource(
        sha256="8e4777a0",
        license="Apache-2.0",
        url="https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-cadene/inceptionv4-8e4777a0.pth",
    ),
    preprocessing=Preprocessing(
        input_px=299, resize_px=341, interpolation="bicubic", mean=MINUS_ONE_TO_ONE, std=MINUS_ONE_TO_ONE
    ),
    cost=Cost(42_679_816, 12_253_974_624),
)


@register_model(GOOGLENET)
def googlenet(num_classes: int, in_channels: int = 3, *, aux: bool = False) -> nn.Module:
    """Build GoogLeNet: a stem and nine Inception blocks. The auxiliary heads follow the blocks 4a and 4d.

    images         (N, 3, 224, 224)
    stem           conv 7x7/2, pool, conv 1x1, conv 3x3, pool -> (N, 192, 28, 28)
    inception3a-b  (N, 256, 28, 28), (N, 480, 28, 28), pool
    inception4a-e  3 x (N, 512, 14, 14), (N, 528, 14, 14), (N, 832, 14, 14), pool
    inception5a-b  (N, 832, 7, 7), (N, 1024, 7, 7)
    fc             average pool, dropout, 1024 -> num_classes
    """
    return adapt_in_channels(GoogLeNet(num_classes=num_classes, aux_logits=aux, init_weights=True), in_channels)


@register_model(INCEPTION_V3)
def inception_v3(num_classes: int, in_channels: int = 3, *, aux: bool = False) -> nn.Module:
    """Build Inception v3: two 3x3 convolutions replace each 5x5, 1x7 and 7x1 replace each 7x7.

    The auxiliary head follows the block 6e.

    images     (N, 3, 299, 299)
    stem       (N, 192, 35, 35)
    Mixed_5    (N, 256, 35, 35), (N, 288, 35, 35), (N, 288, 35, 35)
    Mixed_6    5 x (N, 768, 17, 17)
    Mixed_7    (N, 1280, 8, 8), (N, 2048, 8, 8), (N, 2048, 8, 8)
    fc         average pool, dropout, 2048 -> num_classes
    """
    return adapt_in_channels(Inception3(num_classes=num_classes, aux_logits=aux, init_weights=True), in_channels)


@register_model(INCEPTION_V4)
def inception_v4(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build Inception v4: more blocks of a uniform design, without an auxiliary head.

    images           (N, 3, 299, 299)
    features.0-5     stem -> (N, 384, 35, 35)
    features.6-9     4 x Inception-A (N, 384, 35, 35), reduction
    features.10-17   7 x Inception-B (N, 1024, 17, 17), reduction
    features.18-21   3 x Inception-C (N, 1536, 8, 8)
    last_linear      average pool, 1536 -> num_classes
    """
    import timm  # imported here because it takes a second, and most commands do not need it

    return timm.create_model("inception_v4", num_classes=num_classes, in_chans=in_channels)
