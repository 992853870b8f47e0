"""Heads whose outputs are the logits: check for them, and add a constant to each logit by changing a bias."""

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
    if outputs_logits(classifier, spec):
        return
    raise ConfigError(
        "--class-weights, --sampling and --class-frequencies need a network whose last layer outputs the logits, and that of "
        f"{spec.name} does not. Choose another network with --backbone."
    )


def require_logistic_head(classifier: Classifier, spec: ModelSpec) -> None:
    """Check that the network has a single Linear layer as its head, whose outputs are the logits.

    Raises:
        ConfigError: The head cannot be fitted by logistic regression.
    """
    is_single = len(spec.heads) == 1 and isinstance(classifier.net.get_submodule(spec.head), nn.Linear)
    if is_single and outputs_logits(classifier, spec):
        return
    raise ConfigError(
        f"--head logistic needs a network whose last layer is Linear and outputs the logits, and that of {spec.name} does not. "
        "Use --head linear."
    )


def outputs_logits(classifier: Classifier, spec: ModelSpec) -> bool:
    """Return whether each head has a bias, and the network outputs the logits of its heads."""
    biases = _biases(classifier.net, spec.heads)
    if len(biases) < len(spec.heads):
        return False
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
