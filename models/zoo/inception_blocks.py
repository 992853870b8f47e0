"""The Inception block on its own, in the three forms that the papers compare, and what each costs.

All of them look at a map with windows of several sizes side by side and put the answers on top of each other. With the widths
of GoogLeNet's block 3a, for (N, 192, 28, 28):

| form                     | gives             | parameters |        MACs |
| ------------------------ | ----------------- | ---------- | ----------- |
| naive                    | (N, 416, 28, 28)  |    387,296 | 303,464,448 |
| reduced (v1)             | (N, 256, 28, 28)  |    163,696 | 128,049,152 |
| two 3x3 for the 5x5 (v2) | (N, 256, 28, 28)  |    164,752 | 128,851,968 |

The naive block's pooling keeps all 192 maps, so that maps grow from block to block; 1x1 convolutions before the large windows
and behind the pooling stop that. Behind so narrow a reduction (16 maps) two 3x3 windows cost as much as one of 5x5; between
maps of equal width they cost 18/25 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.flops import count_macs, count_parameters

# GoogLeNet's table 1, row "inception (3a)": how many maps each branch gives, and to how many the 1x1 before it reduces.
IN_CHANNELS = 192
ONE, THREE, FIVE, POOL = 64, 128, 32, 32
REDUCE_THREE, REDUCE_FIVE = 96, 16


def conv_relu(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """A convolution that keeps the map's size, and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=kernel, padding=kernel // 2), nn.ReLU())


class ParallelBranches(nn.Module):
    """Branches side by side: each sees the same map, their maps are put on top of each other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def naive() -> nn.Module:
    """Szegedy et al. 2014 (arXiv 1409.4842), figure 2a."""
    return ParallelBranches(
        conv_relu(IN_CHANNELS, ONE, 1),  # (N, 64, 28, 28)
        conv_relu(IN_CHANNELS, THREE, 3),  # (N, 128, 28, 28)
        conv_relu(IN_CHANNELS, FIVE, 5),  # (N, 32, 28, 28)
        nn.MaxPool2d(3, stride=1, padding=1),  # (N, 192, 28, 28)
    )


def reduced() -> nn.Module:
    """The same, figure 2b: a 1x1 convolution before each large window."""
    return ParallelBranches(
        conv_relu(IN_CHANNELS, ONE, 1),  # (N, 64, 28, 28)
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_THREE, 1), conv_relu(REDUCE_THREE, THREE, 3)),  # (N, 128, 28, 28)
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_FIVE, 1), conv_relu(REDUCE_FIVE, FIVE, 5)),  # (N, 32, 28, 28)
        nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_relu(IN_CHANNELS, POOL, 1)),  # (N, 32, 28, 28)
    )


def factorized() -> nn.Module:
    """Inception v2, Szegedy et al. 2015 (arXiv 1512.00567), figure 5: the 5x5 window as two of 3x3."""
    return ParallelBranches(
        conv_relu(IN_CHANNELS, ONE, 1),
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_THREE, 1), conv_relu(REDUCE_THREE, THREE, 3)),
        nn.Sequential(conv_relu(IN_CHANNELS, REDUCE_FIVE, 1), stacked_3x3(REDUCE_FIVE, FIVE)),
        nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_relu(IN_CHANNELS, POOL, 1)),
    )


def stacked_3x3(inputs: int, outputs: int) -> nn.Module:
    """Two 3x3 convolutions, which together see a window of 5x5."""
    return nn.Sequential(conv_relu(inputs, outputs, 3), conv_relu(outputs, outputs, 3))


def compare_costs(side_px: int = 28) -> dict[str, tuple[int, int]]:
    """Parameters and MACs of each form on a map of ``side_px``, by name."""
    blocks = {"naive": naive(), "reduced": reduced(), "factorized": factorized()}
    return {name: (count_parameters(block), count_macs(block, IN_CHANNELS, side_px, side_px)) for name, block in blocks.items()}
