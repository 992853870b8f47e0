"""ResNet (2015): residual blocks that learn a correction to their input, which makes very deep networks trainable.

He, Zhang, Ren and Sun 2015, "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385).
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.networks.head_replacement import adapt_in_channels
from models.networks.registry import register_model
from models.networks.spec import Cost, ModelSpec, WeightsSource

# The paper's table 1: the number of blocks per stage. A basic block has two 3x3 convolutions. A bottleneck has 1x1, 3x3 and
# 1x1, and its output is four times as wide as its inside.
BASIC = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
}
BOTTLENECK = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# torchvision's first weights, trained with the paper's recipe. The second ones have a higher ImageNet accuracy (resnet50: 80.9%
# instead of 76.1%), but were trained for 600 epochs with label smoothing, which gives worse features for a new head
# (Kornblith et al. 2019, https://arxiv.org/abs/1805.08974).
FILES = {
    18: "resnet18-f37072fd.pth",
    34: "resnet34-b627a593.pth",
    50: "resnet50-0676ba61.pth",
    101: "resnet101-63fe2227.pth",
    152: "resnet152-394f9c45.pth",
}
COSTS = {
    18: Cost(11_689_512, 1_814_073_344),
    34: Cost(21_797_672, 3_663_761_408),
    50: Cost(25_557_032, 4_089_184_256),
    101: Cost(44_549_160, 7_801_405_440),
    152: Cost(60_192_808, 11_513_626_624),
}


def _register(depth: int) -> None:
    block, blocks = (BasicBlock, BASIC[depth]) if depth in BASIC else (Bottleneck, BOTTLENECK[depth])
    spec = ModelSpec(
        name=f"resnet{depth}",
        title=f"ResNet-{depth}",
        year=2015,
        paper="https://arxiv.org/abs/1512.03385",
        head="fc",
        cam_layer="layer4",
        weights=WeightsSource.torchvision(FILES[depth]),
        cost=COSTS[depth],
    )

    @register_model(spec)
    def resnet(num_classes: int, in_channels: int = 3) -> nn.Module:
        """Build a stem and four stages of residual blocks; bottlenecks (50 or more layers) are four times as wide.

        images   (N, 3, 224, 224)
        stem     conv 7x7/2 64, max pool -> (N, 64, 56, 56)
        layer1   (N, 64, 56, 56)    or (N, 256, 56, 56)
        layer2   (N, 128, 28, 28)   or (N, 512, 28, 28)
        layer3   (N, 256, 14, 14)   or (N, 1024, 14, 14)
        layer4   (N, 512, 7, 7)     or (N, 2048, 7, 7)
        fc       average pool, 512 or 2048 -> num_classes
        """
        return adapt_in_channels(ResNet(block, list(blocks), num_classes=num_classes), in_channels)


for _depth in (*BASIC, *BOTTLENECK):
    _register(_depth)
