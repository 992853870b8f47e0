"""The Inception block in the three forms that the papers compare, and their costs.

Each form applies convolutions of several sizes to the same input and concatenates their outputs. With the widths of GoogLeNet's
block 3a and an input of (N, 192, 28, 28):

| form                     | output            | parameters |        MACs |
| ------------------------ | ----------------- | ---------- | ----------- |
| naive                    | (N, 416, 28, 28)  |    387,296 | 303,464,448 |
| reduced (v1)             | (N, 256, 28, 28)  |    163,696 | 128,049,152 |
| two 3x3 for the 5x5 (v2) | (N, 256, 28, 28)  |    164,752 | 128,851,968 |

The pooling of the naive block keeps all 192 feature maps, so their number grows from block to block. The 1x1 convolutions
before the large kernels and after the pooling prevent that. After such a narrow reduction (16 maps), two 3x3 convolutions
cost as much as one 5x5. With equal input and output widths, they cost 18/25 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.flops import count_macs, count_parameters

# GoogLeNet's table 1, row "inception (3a)": the output channels of each branch, and those of its 1x1 reduction.
IN_CHANNELS = 192
ONE, THREE, FIVE, POOL = 64, 128, 32, 32
REDUCE_THREE, REDUCE_FIVE = 96, 16


def conv_relu(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """Build a convolution that keeps the feature map's size, followed by ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=kernel, padding=kernel // 2), nn.ReLU())


class ParallelBranches(nn.Module):
    """Apply all branches to the same input and concatenate their outputs along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def naive() -> nn.Module:
    """Build the naive block: Szegedy et al. 2014 (https://arxiv.org/abs/1409.4842), figure 2a."""
    return ParallelBranches(
        conv_relu(IN_CHANNELS, ONE, 1),  # (N, 64, 28, 28)
        conv_relu(IN_CHANNELS, THREE, 3),  # (N, 128, 28, 28)
        conv_relu(IN_CHANNELS, FIVE, 5),  # (N, 32, 28, 28)
        nn.MaxPool2d(3, stride=1, padding=1),  # (N, 192, 28, 28)
    )


def reduced() -> nn.Module:
    """Build the block with a 1x1 reduction before each large kernel: the same paper, figure 2b."""
    return ParallelBranches(
        conv_relu(IN_CHANNELS, ONE, 1),  # (N, 64, 28, 28)
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_THREE, 1), conv_relu(REDUCE_THREE, THREE, 3)),  # (N, 128, 28, 28)
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_FIVE, 1), conv_relu(REDUCE_FIVE, FIVE, 5)),  # (N, 32, 28, 28)
        nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_relu(IN_CHANNELS, POOL, 1)),  # (N, 32, 28, 28)
    )


def factorized() -> nn.Module:
    """Build the block with two 3x3 convolutions instead of one 5x5.

    Inception v2: Szegedy et al. 2015 (https://arxiv.org/abs/1512.00567), figure 5.
    """
    return ParallelBranches(
        conv_relu(IN_CHANNELS, ONE, 1),
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_THREE, 1), conv_relu(REDUCE_THREE, THREE, 3)),
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_FIVE, 1), stacked_3x3(REDUCE_FIVE, FIVE)),
        nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_relu(IN_CHANNELS, POOL, 1)),
    )


def stacked_3x3(inputs: int, outputs: int) -> nn.Module:
    """Build two 3x3 convolutions, which have a receptive field of 5x5."""
    return nn.Sequential(conv_relu(inputs, outputs, 3), conv_relu(outputs, outputs, 3))


def compare_costs(side_px: int = 28) -> dict[str, tuple[int, int]]:
    """Count the parameters and MACs of each form for a feature map of ``side_px`` x ``side_px``."""
    blocks = {"naive": naive(), "reduced": reduced(), "factorized": factorized()}
    return {name: (count_parameters(block), count_macs(block, IN_CHANNELS, side_px, side_px)) for name, block in blocks.items()}
