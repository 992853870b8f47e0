"""Networks of the zoo made cheap to run: smaller inputs and narrow fully connected layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.networks import registry
from models.networks.registry import create_model, get_spec, list_models
from models.networks.spec import ModelSpec

# The first Linear layer requires a feature map of one size, or (Inception) the pooling windows a minimum size.
SMALLEST_PX = {"alexnet": 64, "inception_v3": 75, "inception_v4": 75, "squeezenet1_1": 96}
FIXED = {
    "alexnet_2012",
    "cnn_mnist",
    "cnn_selu",
    "cnn_separable",
    "cnn_two_conv",
    "lenet5",
    "lenet_cifar",
    "mlp",
    "vgg_cifar",
    "vgg_mnist",
}
WIDE = ("alexnet", "alexnet_2012", *(name for name in list_models() if name.startswith("vgg1")))


def thin(net: nn.Module, units: int = 32) -> nn.Module:
    """``net`` with its hidden fully connected layers ``units`` wide: VGG's 4096 units have 90% of its parameters."""
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    inputs = layers[0][1].in_features
    for name, layer in layers[:-1]:
        net.set_submodule(name, nn.Linear(inputs, units, device=layer.weight.device))
        inputs = units
    name, layer = layers[-1]
    net.set_submodule(name, nn.Linear(inputs, layer.out_features, device=layer.weight.device))
    return net


def thin_builder(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``builder`` followed by ``thin``, without drawing numbers for the wide layers first."""

    def build(*args: int, **design: int) -> nn.Module:
        with torch.device("meta"):
            net = thin(builder(*args, **design))
        if torch.empty(0).is_meta:
            return net
        net.to_empty(device="cpu")
        for layer in net.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return net

    return build


@contextlib.contextmanager
def made_small(name: str, *, small_images: bool = True) -> Iterator[ModelSpec]:
    """Register a cheap network with the same layers as ``name`` inside the block. Yields its spec."""
    spec, builder = registry._entry(name)
    if small_images and name not in FIXED:
        side = SMALLEST_PX.get(name, 32)
        spec = replace(spec, preprocessing=replace(spec.preprocessing, input_px=side, resize_px=side))
    build = thin_builder(builder) if name in WIDE else builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._ENTRIES, name, (spec, build))
        yield spec


def random_state(name: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Return a random state dict, scaled so that activations neither vanish nor explode, with BatchNorm statistics."""
    with torch.device("meta"):
        empty = create_model(name, num_classes=get_spec(name).pretrained_classes).state_dict()
    numbers = torch.Generator().manual_seed(seed)
    state = {}
    for key, tensor in empty.items():
        if tensor.dtype == torch.long:
            state[key] = torch.zeros((), dtype=torch.long)
        elif tensor.dim() > 1:
            bound = (6 / tensor[0].numel()) ** 0.5  # He initialization
            state[key] = torch.empty(tensor.shape).uniform_(-bound, bound, generator=numbers)
        elif key.startswith("layer") and key.endswith(("bn2.weight", "bn3.weight")):
            state[key] = torch.empty(tensor.shape).uniform_(0.2, 0.4, generator=numbers)  # keeps the sum of 50 residuals small
        elif key.endswith(("running_var", "weight")):
            state[key] = torch.empty(tensor.shape).uniform_(0.8, 1.2, generator=numbers)
        else:
            state[key] = torch.empty(tensor.shape).uniform_(-0.1, 0.1, generator=numbers)
    return state


def some_pixels(spec: ModelSpec, count: int = 2) -> Tensor:
    side, channels = spec.preprocessing.input_px, spec.preprocessing.channels
    return torch.randint(0, 256, (count, side, side, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
