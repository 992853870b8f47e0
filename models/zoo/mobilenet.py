"""MobileNet (2017-2019): efficient networks for phones, built on depthwise separable convolutions.

- v1: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
  (https://arxiv.org/abs/1704.04861), introduces depthwise separable convolutions and a width multiplier.
- v2: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (https://arxiv.org/abs/1801.04381).
- v3: Howard et al. 2019, "Searching for MobileNetV3" (https://arxiv.org/abs/1905.02244), is found by architecture search.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchvision import models as torchvision_models

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import SCRATCH_RECIPE, Cost, ModelSpec, WeightsSource
from models.preprocess import Preprocessing

# The paper's table 1: the stride and the width of each block after the stem.
BLOCKS = (
    (1, 64),
    (2, 128),
    (1, 128),
    (2, 256),
    (1, 256),
    (2, 512),
    *[(1, 512)] * 5,
    (2, 1024),
    (1, 1024),
)
WIDTHS = {"": 1.0, "_075": 0.75, "_050": 0.5, "_025": 0.25}
COSTS = {
    "": Cost(4_231_976, 568_740_352),
    "_075": Cost(2_585_560, 325_400_448),
    "_050": Cost(1_331_592, 149_497_088),
    "_025": Cost(470_072, 41_030_272),
}


def separable_cost_ratio(outputs: int, kernel: int) -> float:
    """Compute the MACs of a depthwise separable convolution relative to a standard one: 1/N + 1/D^2.

    Per pixel, a standard convolution costs D * D * M * N MACs, and a depthwise and a pointwise one cost D * D * M + M * N. The
    ratio does not depend on the number of input channels M.

    Args:
        outputs: The number of output channels N.
        kernel: The kernel's side D.
    """
    return 1 / outputs + 1 / kernel**2


def depthwise_separable(inputs: int, outputs: int, *, stride: int) -> nn.Module:
    """Build a 3x3 depthwise and a 1x1 pointwise convolution, each followed by BatchNorm and ReLU."""
    return nn.Sequential(
        OrderedDict(
            depthwise=nn.Conv2d(inputs, inputs, kernel_size=3, stride=stride, padding=1, groups=inputs, bias=False),
            norm1=nn.BatchNorm2d(inputs),
            relu1=nn.ReLU(),
            pointwise=nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
            norm2=nn.BatchNorm2d(outputs),
            relu2=nn.ReLU(),
        )
    )


def conv_bn_relu(inputs: int, outputs: int, *, stride: int) -> nn.Module:
    """Build a standard 3x3 convolution with BatchNorm and ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )


def build_v1(num_classes: int, in_channels: int, *, width: float, block: str) -> nn.Module:
    """Build MobileNetV1: a stem and thirteen blocks.

    ``width`` multiplies the paper's widths, and ``block`` is "separable" or "standard".

    images     (N, 3, 224, 224)
    stem       conv 3x3/2 -> (N, 32, 112, 112)
    block1     (N, 64, 112, 112)
    block2-3   (N, 128, 56, 56)
    block4-5   (N, 256, 28, 28)
    block6-11  (N, 512, 14, 14)
    block12-13 (N, 1024, 7, 7)
    output     average pool, 1024 -> num_classes
    """
    make_block = {"separable": depthwise_separable, "standard": conv_bn_relu}[block]
    channels = int(32 * width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=conv_bn_relu(in_channels, channels, stride=2))
    for number, (stride, full_width) in enumerate(BLOCKS, start=1):
        layers[f"block{number}"] = make_block(channels, int(full_width * width), stride=stride)
        channels = int(full_width * width)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


def _register_v1(suffix: str, multiplier: float) -> None:
    spec = ModelSpec(
        name=f"mobilenet_v1{suffix}",
        title="MobileNetV1" if multiplier == 1 else f"MobileNetV1, width {multiplier:g}",
        year=2017,
        paper="https://arxiv.org/abs/1704.04861",
        head="output",
        cam_layer="block13",
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        recipe=SCRATCH_RECIPE,
        cost=COSTS[suffix],
    )

    @register_model(spec)
    def mobilenet_v1(
        num_classes: int, in_channels: int = 3, *, width: float = multiplier, block: str = "separable"
    ) -> nn.Module:
        """Build MobileNetV1 with a width multiplier; ``block="standard"`` builds the comparison network of table 4."""
        return build_v1(num_classes, in_channels, width=width, block=block)


for _suffix, _multiplier in WIDTHS.items():
    _register_v1(_suffix, _multiplier)

MOBILENET_V2 = ModelSpec(
    name="mobilenet_v2",
    title="MobileNetV2",
    year=2018,
    paper="https://arxiv.org/abs/1801.04381",
    head="classifier.1",
    cam_layer="features",
    # torchvision's second weights: 0.3 percentage points better than the first, trained for a resize to 232 px.
    weights=WeightsSource.torchvision("mobilenet_v2-7ebf99e0.pth"),
    preprocessing=Preprocessing(resize_px=232),
    cost=Cost(3_504_872, 300_774_272),
)
MOBILENET_V3_SMALL = ModelSpec(
    name="mobilenet_v3_small",
    title="MobileNetV3 small",
    year=2019,
    paper="https://arxiv.org/abs/1905.02244",
    head="classifier.3",
    cam_layer="features",
    weights=WeightsSource.torchvision("mobilenet_v3_small-047dcff4.pth"),
    cost=Cost(2_542_856, 56_510_400),
)
MOBILENET_V3_LARGE = ModelSpec(
    name="mobilenet_v3_large",
    title="MobileNetV3 large",
    year=2019,
    paper="https://arxiv.org/abs/1905.02244",
    head="classifier.3",
    cam_layer="features",
    weights=WeightsSource.torchvision("mobilenet_v3_large-8738ca79.pth"),
    cost=Cost(5_483_032, 216_589_760),
)


@register_model(MOBILENET_V2)
def mobilenet_v2(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build MobileNetV2 from inverted residuals: expand, filter depthwise, project without an activation.

    images       (N, 3, 224, 224)
    features     stem (N, 32, 112, 112), 17 blocks -> (N, 320, 7, 7), conv 1x1 -> (N, 1280, 7, 7)
    classifier   average pool, dropout, 1280 -> num_classes
    """
    return adapt_in_channels(torchvision_models.mobilenet_v2(num_classes=num_classes), in_channels)


@register_model(MOBILENET_V3_SMALL)
def mobilenet_v3_small(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build MobileNetV3 small: inverted residuals with squeeze-and-excitation and hard-swish, found by search.

    images       (N, 3, 224, 224)
    features     stem (N, 16, 112, 112), 11 blocks -> (N, 96, 7, 7), conv 1x1 -> (N, 576, 7, 7)
    classifier   average pool, 576 -> 1024, dropout, 1024 -> num_classes
    """
    return adapt_in_channels(torchvision_models.mobilenet_v3_small(num_classes=num_classes), in_channels)


@register_model(MOBILENET_V3_LARGE)
def mobilenet_v3_large(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build MobileNetV3 large, which has more and wider blocks than the small version.

    images       (N, 3, 224, 224)
    features     stem (N, 16, 112, 112), 15 blocks -> (N, 160, 7, 7), conv 1x1 -> (N, 960, 7, 7)
    classifier   average pool, 960 -> 1280, dropout, 1280 -> num_classes
    """
    return adapt_in_channels(torchvision_models.mobilenet_v3_large(num_classes=num_classes), in_channels)
