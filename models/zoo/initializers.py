"""How networks of our own start, where their source says so; otherwise it is PyTorch's default."""

from __future__ import annotations

from torch import nn


def xavier_uniform(layer: nn.Module) -> None:
    """Uniform, so that signals and gradients keep their size (Glorot and Bengio 2010); for ``net.apply``.

    Biases stay PyTorch's, as in "Dive into Deep Learning".
    """
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(layer.weight)


def lecun_normal(layer: nn.Module) -> None:
    """Normal with variance 1 / fan-in and no bias, which SELU needs to keep mean 0 and variance 1 (Klambauer et al. 2017)."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
