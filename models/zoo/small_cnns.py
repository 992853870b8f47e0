"""Small convolutional networks for 28 px grayscale images, small enough to count by hand.

- Convolutions with shared weights: LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition"
  (https://doi.org/10.1162/neco.1989.1.4.541).
- SELU: Klambauer et al. 2017, "Self-Normalizing Neural Networks" (https://arxiv.org/abs/1706.02515).
- Depthwise separable convolutions: Chollet 2016, "Xception: Deep Learning with Depthwise Separable Convolutions"
  (https://arxiv.org/abs/1610.02357).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from models.networks.registry import register_model
from models.networks.spec import GRAY_28, SCRATCH_RECIPE, Cost, ModelSpec
from models.zoo.initializers import lecun_normal


def _spec(name: str, title: str, *, year: int, paper: str, cam_layer: str, cost: Cost) -> ModelSpec:
    return ModelSpec(
        name=name,
        title=title,
        year=year,
        paper=paper,
        head="output",
        cam_layer=cam_layer,
        preprocessing=GRAY_28,
        recipe=SCRATCH_RECIPE,
        pretrained_classes=10,
        cost=cost,
    )


LECUN_1989 = "https://doi.org/10.1162/neco.1989.1.4.541"
CNN_MNIST = _spec(
    "cnn_mnist", "CNN with six feature maps", year=1989, paper=LECUN_1989, cam_layer="relu2", cost=Cost(6_422, 149_300)
)
CNN_TWO_CONV = _spec(
    "cnn_two_conv", "CNN with two convolutions", year=1989, paper=LECUN_1989, cam_layer="relu2", cost=Cost(8_490, 467_200)
)
CNN_SELU = _spec(
    "cnn_selu",
    "CNN with SELU",
    year=2017,
    paper="https://arxiv.org/abs/1706.02515",
    cam_layer="features.selu6",
    cost=Cost(435_306, 29_275_904),
)
CNN_SEPARABLE = _spec(
    "cnn_separable",
    "CNN with depthwise separable convolutions",
    year=2017,
    paper="https://arxiv.org/abs/1610.02357",
    cam_layer="features.selu6",
    cost=Cost(184_234, 4_065_600),
)


@register_model(CNN_MNIST)
def cnn_mnist(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build a CNN with 6,422 parameters for 10 classes: fewer than the perceptron, but with local connectivity."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 6, kernel_size=5),  # (N, 6, 24, 24)
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),  # (N, 6, 12, 12)
            conv2=nn.Conv2d(6, 6, kernel_size=5),  # (N, 6, 8, 8)
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),  # (N, 6, 4, 4)
            flatten=nn.Flatten(),  # (N, 96)
            hidden=nn.Linear(6 * 4 * 4, 50),
            relu3=nn.ReLU(),
            output=nn.Linear(50, num_classes),
        )
    )


@register_model(CNN_TWO_CONV)
def cnn_two_conv(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build a CNN with 8,490 parameters for 10 classes: two convolutions and a Linear(320, 10)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 10, kernel_size=5),  # (N, 10, 24, 24)
            pool1=nn.MaxPool2d(2),  # (N, 10, 12, 12)
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(10, 20, kernel_size=5),  # (N, 20, 8, 8)
            pool2=nn.MaxPool2d(2),  # (N, 20, 4, 4)
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),  # (N, 320)
            output=nn.Linear(20 * 4 * 4, num_classes),
        )
    )


def conv3x3(inputs: int, outputs: int) -> nn.Module:
    """Build a standard 3x3 convolution with 9 * inputs * outputs + outputs parameters."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def separable_conv3x3(inputs: int, outputs: int) -> nn.Module:
    """Build a depthwise and a pointwise convolution with 9 * inputs + inputs * outputs + outputs parameters."""
    return nn.Sequential(
        OrderedDict(
            depthwise=nn.Conv2d(inputs, inputs, kernel_size=3, padding=1, groups=inputs, bias=False),
            pointwise=nn.Conv2d(inputs, outputs, kernel_size=1),
        )
    )


def build_vgg_like(num_classes: int, in_channels: int, layer: Callable[[int, int], nn.Module]) -> nn.Module:
    """Build three pairs of 3x3 convolutions and two fully connected layers.

    ``layer(inputs, outputs)`` builds each convolution except the first one, which is always a standard one.
    """
    features = nn.Sequential(
        OrderedDict(
            conv1=conv3x3(in_channels, 32),  # (N, 32, 28, 28)
            selu1=nn.SELU(),
            conv2=layer(32, 32),  # (N, 32, 28, 28)
            selu2=nn.SELU(),
            pool1=nn.MaxPool2d(2),  # (N, 32, 14, 14)
            conv3=layer(32, 64),  # (N, 64, 14, 14)
            selu3=nn.SELU(),
            conv4=layer(64, 64),  # (N, 64, 14, 14)
            selu4=nn.SELU(),
            pool2=nn.MaxPool2d(2),  # (N, 64, 7, 7)
            conv5=layer(64, 128),  # (N, 128, 7, 7)
            selu5=nn.SELU(),
            conv6=layer(128, 128),  # (N, 128, 7, 7)
            selu6=nn.SELU(),
            pool3=nn.MaxPool2d(2),  # (N, 128, 3, 3)
        )
    )
    net = nn.Sequential(
        OrderedDict(
            features=features,
            flatten=nn.Flatten(),  # (N, 1152)
            hidden=nn.Linear(128 * 3 * 3, 128),
            selu=nn.SELU(),
            output=nn.Linear(128, num_classes),
        )
    )
    return net.apply(lecun_normal)


@register_model(CNN_SELU)
def cnn_selu(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build a CNN with SELU and 435,306 parameters for 10 classes."""
    return build_vgg_like(num_classes, in_channels, conv3x3)


@register_model(CNN_SEPARABLE)
def cnn_separable(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build ``cnn_selu`` with separable convolutions after the first one: 184,234 parameters for 10 classes."""
    return build_vgg_like(num_classes, in_channels, separable_conv3x3)
