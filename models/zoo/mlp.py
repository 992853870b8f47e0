"""Multilayer perceptron (1986): hidden layers trained by backpropagation, without any knowledge of image structure.

Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating errors" (https://doi.org/10.1038/323533a0).
"""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.registry import register_model
from models.networks.spec import GRAY_28, SCRATCH_RECIPE, Cost, ModelSpec

MLP_SPEC = ModelSpec(
    name="mlp",
    title="Multilayer perceptron",
    year=1986,
    paper="https://doi.org/10.1038/323533a0",
    head="output",
    cam_layer="image",  # the only layer with a map; explanations refer to the pixels
    preprocessing=GRAY_28,
    recipe=SCRATCH_RECIPE,
    pretrained_classes=10,
    cost=Cost(6_442, 6_416),
)


class MLP(nn.Module):
    """Two hidden layers of n units; n = 8 has 784 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10 = 6,442 parameters.

    The network ends with LogSoftmax. The classifier's own LogSoftmax after it changes nothing.
    """

    def __init__(self, num_classes: int, in_channels: int, units: int) -> None:
        super().__init__()
        self.image = nn.Identity()
        self.hidden1 = nn.Linear(in_channels * 28 * 28, units)
        self.hidden2 = nn.Linear(units, units)
        self.output = nn.Linear(units, num_classes)
        self.relu = nn.ReLU()
        self.log_softmax = nn.LogSoftmax(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.image(images)  # (N, 1, 28, 28)
        x = x.flatten(1)  # (N, 784)
        x = self.relu(self.hidden1(x))  # (N, 8)
        x = self.relu(self.hidden2(x))  # (N, 8)
        return self.log_softmax(self.output(x))  # (N, 10)


@register_model(MLP_SPEC)
def mlp(num_classes: int, in_channels: int = 1, *, units: int = 8) -> nn.Module:
    """Build a perceptron 784 -> units -> units -> num_classes."""
    return MLP(num_classes, in_channels, units)
