"""VGG (2014): deep stacks of 3x3 convolutions instead of few large ones.

Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(https://arxiv.org/abs/1409.1556).
"""

from __future__ import annotations

from torch import nn
from torchvision.models.vgg import VGG, make_layers

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import GRAY_28, RGB_32, SCRATCH_RECIPE, Cost, ModelSpec, WeightsSource

PAPER = "https://arxiv.org/abs/1409.1556"
WIDTHS = (64, 128, 256, 512, 512)
# The paper's table 1, columns A, B, D and E: the number of convolutions in each of the five stages.
DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
FILES = {
    "vgg11": "vgg11-8a719046.pth",
    "vgg13": "vgg13-19584684.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "vgg11_bn": "vgg11_bn-6002323d.pth",
    "vgg13_bn": "vgg13_bn-abd245e5.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
}
COSTS = {
    "vgg11": Cost(132_863_336, 7_609_090_048),
    "vgg13": Cost(133_047_848, 11_308_466_176),
    "vgg16": Cost(138_357_544, 15_470_264_320),
    "vgg19": Cost(143_667_240, 19_632_062_464),
    "vgg11_bn": Cost(132_868_840, 7_609_090_048),
    "vgg13_bn": Cost(133_053_736, 11_308_466_176),
    "vgg16_bn": Cost(138_365_992, 15_470_264_320),
    "vgg19_bn": Cost(143_678_248, 19_632_062_464),
}
DIGESTS = {"vgg16": {"sha256": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"}}


def vgg_layers(depth: int) -> list[str | int]:
    """Return torchvision's layer configuration: [64, "M", 128, "M", ...], where "M" is a 2x2 max pooling."""
    layers: list[str | int] = []
    for width, count in zip(WIDTHS, DEPTHS[depth], strict=True):
        layers += [width] * count + ["M"]
    return layers


def _register(depth: int, *, batch_norm: bool) -> None:
    name = f"vgg{depth}_bn" if batch_norm else f"vgg{depth}"
    spec = ModelSpec(
        name=name,
        title=f"VGG{depth} with BatchNorm" if batch_norm else f"VGG{depth}",
        year=2014,
        paper=PAPER,
        head="classifier.6",
        cam_layer=f"features.{(3 if batch_norm else 2) * sum(DEPTHS[depth]) + 3}",  # the last ReLU, after four poolings
        weights=WeightsSource.torchvision(FILES[name], **DIGESTS.get(name, {})),
        cost=COSTS[name],
    )

    @register_model(spec)
    def vgg(num_classes: int, in_channels: int = 3) -> nn.Module:
        """Build five stages of 3x3 convolutions, each followed by max pooling, and three fully connected layers.

        images       (N, 3, 224, 224)
        features     64 wide,  pool -> (N, 64, 112, 112)
                     128 wide, pool -> (N, 128, 56, 56)
                     256 wide, pool -> (N, 256, 28, 28)
                     512 wide, pool -> (N, 512, 14, 14)
                     512 wide, pool -> (N, 512, 7, 7)
        classifier   25088 -> 4096 -> 4096 -> num_classes, dropout between them
        """
        return adapt_in_channels(
            VGG(make_layers(vgg_layers(depth), batch_norm=batch_norm), num_classes=num_classes), in_channels
        )


for _depth in DEPTHS:
    for _batch_norm in (False, True):
        _register(_depth, batch_norm=_batch_norm)

VGG_CIFAR = ModelSpec(
    name="vgg_cifar",
    title="VGG11 for CIFAR-10",
    year=2015,
    paper=PAPER,
    head="output",
    cam_layer="features.20",  # the ReLU after the sixth convolution, (N, 512, 4, 4); later maps are only 2 px wide
    preprocessing=RGB_32,
    recipe=SCRATCH_RECIPE,
    pretrained_classes=10,
    cost=Cost(9_231_114, 152_769_536),
)
VGG_MNIST = ModelSpec(
    name="vgg_mnist",
    title="VGG16 for MNIST",
    year=2015,
    paper=PAPER,
    head="output",
    cam_layer="features.32",  # the ReLU after the tenth convolution, (N, 512, 4, 4); later maps are only 2 px wide
    preprocessing=GRAY_28,
    recipe=SCRATCH_RECIPE,
    pretrained_classes=10,
    cost=Cost(14_727_114, 267_646_976),
)


@register_model(VGG_CIFAR)
def vgg_cifar(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build the convolutions of VGG11 with BatchNorm for 32 px images, followed by a single Linear layer.

    images     (N, 3, 32, 32)
    features   64 M           -> (N, 64, 16, 16)
               128 M          -> (N, 128, 8, 8)
               256 256 M      -> (N, 256, 4, 4)
               512 512 M      -> (N, 512, 2, 2)
               512 512 M      -> (N, 512, 1, 1)
    output     512 -> num_classes
    """
    net = nn.Sequential()
    net.add_module("features", make_layers(vgg_layers(11), batch_norm=True))
    net.add_module("flatten", nn.Flatten())
    net.add_module("output", nn.Linear(512, num_classes))
    return adapt_in_channels(net, in_channels)


@register_model(VGG_MNIST)
def vgg_mnist(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build the convolutions of VGG16 with BatchNorm for 28 px images, followed by a single Linear layer.

    Poolings round up, as five of them would otherwise reduce 28 px to nothing.

    images     (N, 1, 28, 28)
    features   64 64 M         -> (N, 64, 14, 14)
               128 128 M       -> (N, 128, 7, 7)
               256 256 256 M   -> (N, 256, 4, 4)
               512 512 512 M   -> (N, 512, 2, 2)
               512 512 512 M   -> (N, 512, 1, 1)
    output     512 -> num_classes
    """
    features = make_layers(vgg_layers(16), batch_norm=True)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    net = nn.Sequential()
    net.add_module("features", features)
    net.add_module("flatten", nn.Flatten())
    net.add_module("output", nn.Linear(512, num_classes))
    return adapt_in_channels(net, in_channels)
