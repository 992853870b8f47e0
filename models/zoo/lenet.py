"""LeNet (1998): convolutions and pooling, trained end to end with backpropagation to recognize digits.

LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document Recognition"
(https://doi.org/10.1109/5.726791). ``lenet5`` follows "Dive into Deep Learning", chapter 7.6
(https://d2l.ai/chapter_convolutional-neural-networks/lenet.html), including its initialization. ``lenet_cifar`` is for 32 px
color images, with ReLU and max pooling as in PyTorch's introductory tutorial
(https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from torch import nn

from models.networks.registry import register_model
from models.networks.spec import GRAY_28, RGB_32, SCRATCH_RECIPE, Cost, ModelSpec
from models.zoo.initializers import xavier_uniform

LENET5 = ModelSpec(
    name="lenet5",
    title="LeNet-5",
    year=1998,
    paper="https://doi.org/10.1109/5.726791",
    head="output",
    cam_layer="sigmoid2",
    preprocessing=GRAY_28,
    # Four sigmoids shrink the gradient, so this uses more steps (small batches) and a larger learning rate.
    recipe=replace(SCRATCH_RECIPE, batch_size=16, lr=0.003),
    pretrained_classes=10,
    cost=Cost(61_706, 416_520),
)
LENET_CIFAR = ModelSpec(
    name="lenet_cifar",
    title="LeNet for CIFAR-10",
    year=1998,
    paper="https://doi.org/10.1109/5.726791",
    head="output",
    cam_layer="relu2",
    preprocessing=RGB_32,
    recipe=SCRATCH_RECIPE,
    pretrained_classes=10,
    cost=Cost(62_006, 651_720),
)


@register_model(LENET5)
def lenet5(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build LeNet-5, with 61,706 parameters for 10 classes. The comments give each layer's output for (N, 1, 28, 28)."""
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 6, kernel_size=5, padding=2),  # (N, 6, 28, 28)
            sigmoid1=nn.Sigmoid(),
            pool1=nn.AvgPool2d(2),  # (N, 6, 14, 14)
            conv2=nn.Conv2d(6, 16, kernel_size=5),  # (N, 16, 10, 10)
            sigmoid2=nn.Sigmoid(),
            pool2=nn.AvgPool2d(2),  # (N, 16, 5, 5)
            flatten=nn.Flatten(),  # (N, 400)
            hidden1=nn.Linear(16 * 5 * 5, 120),
            sigmoid3=nn.Sigmoid(),
            hidden2=nn.Linear(120, 84),
            sigmoid4=nn.Sigmoid(),
            output=nn.Linear(84, num_classes),
        )
    )
    return net.apply(xavier_uniform)


@register_model(LENET_CIFAR)
def lenet_cifar(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build LeNet for CIFAR-10, with 62,006 parameters. The comments give each layer's output for (N, 3, 32, 32)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 6, kernel_size=5),  # (N, 6, 28, 28)
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),  # (N, 6, 14, 14)
            conv2=nn.Conv2d(6, 16, kernel_size=5),  # (N, 16, 10, 10)
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),  # (N, 16, 5, 5)
            flatten=nn.Flatten(),  # (N, 400)
            hidden1=nn.Linear(16 * 5 * 5, 120),
            relu3=nn.ReLU(),
            hidden2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            output=nn.Linear(84, num_classes),
        )
    )
