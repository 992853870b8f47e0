"""AlexNet (2012, 2014): the first deep convolutional network to win ImageNet, trained on GPUs with ReLU and dropout.

Krizhevsky, Sutskever and Hinton 2012, "ImageNet Classification with Deep Convolutional Neural Networks"
(https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks). The single-tower version:
Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks" (https://arxiv.org/abs/1404.5997).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchvision import models as torchvision_models

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import SCRATCH_RECIPE, Cost, ModelSpec, WeightsSource
from models.preprocess import Preprocessing
from models.zoo.initializers import xavier_uniform

ALEXNET_2012 = ModelSpec(
    name="alexnet_2012",
    title="AlexNet 2012",
    year=2012,
    paper="https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
    head="output",
    cam_layer="relu5",
    # No cropping: Fashion-MNIST images, enlarged to 224 px, have no background at the border.
    preprocessing=Preprocessing(resize_px=224, mean=(0.5,), std=(0.5,)),
    recipe=SCRATCH_RECIPE,
    pretrained_classes=10,
    cost=Cost(46_764_746, 938_146_176),
)
ALEXNET = ModelSpec(
    name="alexnet",
    title="AlexNet",
    year=2014,
    paper="https://arxiv.org/abs/1404.5997",
    head="classifier.6",
    cam_layer="features.11",
    weights=WeightsSource.torchvision("alexnet-owt-7be5be79.pth"),
    cost=Cost(61_100_840, 714_188_480),
)


@register_model(ALEXNET_2012)
def alexnet_2012(num_classes: int, in_channels: int = 1) -> nn.Module:
    """Build the layers of the 2012 paper in a single tower, for grayscale images.

    As in "Dive into Deep Learning", chapter 8.1 (https://d2l.ai/chapter_convolutional-modern/alexnet.html). The comments give
    each layer's output for (N, 1, 224, 224).
    """
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 96, kernel_size=11, stride=4, padding=1),  # (N, 96, 54, 54)
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(3, stride=2),  # (N, 96, 26, 26)
            conv2=nn.Conv2d(96, 256, kernel_size=5, padding=2),  # (N, 256, 26, 26)
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(3, stride=2),  # (N, 256, 12, 12)
            conv3=nn.Conv2d(256, 384, kernel_size=3, padding=1),  # (N, 384, 12, 12)
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 384, kernel_size=3, padding=1),  # (N, 384, 12, 12)
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(384, 256, kernel_size=3, padding=1),  # (N, 256, 12, 12)
            relu5=nn.ReLU(),
            pool5=nn.MaxPool2d(3, stride=2),  # (N, 256, 5, 5)
            flatten=nn.Flatten(),  # (N, 6400)
            hidden6=nn.Linear(256 * 5 * 5, 4096),
            relu6=nn.ReLU(),
            dropout6=nn.Dropout(0.5),
            hidden7=nn.Linear(4096, 4096),
            relu7=nn.ReLU(),
            dropout7=nn.Dropout(0.5),
            output=nn.Linear(4096, num_classes),
        )
    )
    return net.apply(xavier_uniform)


@register_model(ALEXNET)
def alexnet(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build torchvision's AlexNet (2014): five convolutions, the first ones large, and three fully connected layers.

    images       (N, 3, 224, 224)
    features     conv 11x11/4 64, pool  -> (N, 64, 27, 27)
                 conv 5x5 192, pool     -> (N, 192, 13, 13)
                 conv 3x3 384, 256, 256 -> (N, 256, 13, 13), pool -> (N, 256, 6, 6)
    classifier   dropout, 9216 -> 4096, dropout, 4096 -> 4096 -> num_classes
    """
    return adapt_in_channels(torchvision_models.alexnet(num_classes=num_classes), in_channels)
