"""Add a constant to each logit of a network by changing the bias of its heads, so that its graph and weights contain it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.errors import ConfigError
from models.networks.classifier import Classifier
from models.networks.spec import ModelSpec


def shift_logits(net: nn.Module, heads: Sequence[str], shift: Tensor) -> None:
    """Add ``shift`` (classes,) to the network's logits, in place."""
    with torch.no_grad():
        for bias in _biases(net, heads):
            bias += shift.to(bias)


def require_shiftable_logits(classifier: Classifier, spec: ModelSpec) -> None:
    """Check that ``shift_logits`` is exact: each head has a bias, and nothing nonlinear follows it.

    Raises:
        ConfigError: The network cannot be trained with class weights.
    """
    biases = _biases(classifier.net, spec.heads)
    if len(biases) == len(spec.heads) and _is_exact(classifier, spec, biases):
        return
    raise ConfigError(
        "--class-weights, --sampling and --class-frequencies need a network whose last layer outputs the logits, and that of "
        f"{spec.name} does not. Choose another network with --backbone."
    )


def _is_exact(classifier: Classifier, spec: ModelSpec, biases: Sequence[Tensor]) -> bool:
    preprocessing = spec.preprocessing
    shape = (2, preprocessing.input_px, preprocessing.input_px, preprocessing.channels)
    device = biases[0].device
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    shift = torch.linspace(-5.0, 5.0, len(biases[0]), device=device)
    original = [bias.detach().clone() for bias in biases]
    mode = classifier.training
    classifier.eval()
    with torch.no_grad():
        expected = torch.log_softmax(classifier(pixels) + shift, dim=1)
        shift_logits(classifier.net, spec.heads, shift)
        actual = classifier(pixels)
        for bias, values in zip(biases, original, strict=True):
            bias.copy_(values)
    classifier.train(mode)
    return torch.allclose(actual, expected, atol=1e-3)


def _biases(net: nn.Module, heads: Sequence[str]) -> list[Tensor]:
    biases = (net.get_submodule(name).bias for name in heads)
    return [bias for bias in biases if isinstance(bias, Tensor)]
