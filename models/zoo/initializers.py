"""Weight initializers for ``net.apply``, used by networks whose source specifies one instead of PyTorch's default."""

from __future__ import annotations

from torch import nn


def xavier_uniform(layer: nn.Module) -> None:
    """Initialize weights uniformly, with a range that preserves the variance of activations and gradients.

    Glorot and Bengio 2010 (https://proceedings.mlr.press/v9/glorot10a.html). Biases keep PyTorch's default, as in "Dive into
    Deep Learning".
    """
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(layer.weight)


def lecun_normal(layer: nn.Module) -> None:
    """Initialize weights from a normal distribution of variance 1 / fan-in, and biases with zero.

    With SELU, this keeps activations at mean 0 and variance 1: Klambauer et al. 2017 (https://arxiv.org/abs/1706.02515).
    """
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
