from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models.errors import UnknownModelError
from models.networks import registry
from models.networks.registry import create_model, get_spec, list_models, register_model
from models.networks.spec import ModelSpec

PARAMETERS = {
    "alexnet": 61_100_840,
    "efficientnet_lite0": 4_652_008,
    "mobilenet_v2": 3_504_872,
    "resnet18": 11_689_512,
    "vgg16": 138_357_544,
}
"""The published numbers, from torchvision's model tables and timm's results."""


def test_networks_are_listed_in_alphabetical_order() -> None:
    assert list_models() == sorted(list_models())
    assert set(PARAMETERS) <= set(list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_matches_the_published_one(name: str) -> None:
    with torch.device("meta"):
        net = create_model(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_head_and_cam_layer_of_the_spec_exist(name: str) -> None:
    spec = get_spec(name)
    assert spec.name == name
    shapes: dict[str, torch.Size] = {}
    with torch.device("meta"):
        net = create_model(name, num_classes=7).eval()
        net.get_submodule(spec.cam_layer).register_forward_hook(lambda *a: shapes.update(map=a[2].shape))
        net.get_submodule(spec.head).register_forward_hook(lambda *a: shapes.update(embedding=a[1][0].shape))
        side = spec.preprocessing.input_px
        logits = net(torch.zeros(2, spec.preprocessing.channels, side, side))
    assert isinstance(net.get_submodule(spec.head), nn.Linear)
    assert logits.shape == (2, 7)
    assert len(shapes["embedding"]) == 2
    count, _, height, width = shapes["map"]
    assert (count, height) == (2, width)
    assert height > 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_file_name_contains_the_sha256_prefix(name: str) -> None:
    weights = get_spec(name).weights
    assert weights is not None
    assert weights.file_name.removesuffix(".pth").endswith(f"-{weights.sha256[:8]}")


def test_unknown_name_error_suggests_the_closest_one() -> None:
    with pytest.raises(UnknownModelError, match=r"'vgg61'.*Did you mean 'vgg16'.*`finetune models`"):
        get_spec("vgg61")
    with pytest.raises(UnknownModelError, match="'zzz'"):
        create_model("zzz")


def test_registered_network_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._load()))
    monkeypatch.setattr(registry, "_load", lambda: registry._ENTRIES)
    spec = ModelSpec("one_layer", "One layer", 1958, "https://doi.org/10.1037/h0042519", "0", "0", pretrained_classes=3)

    @register_model(spec)
    def one_layer(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, num_classes))

    assert "one_layer" in list_models()
    assert get_spec("one_layer") is spec
    assert create_model("one_layer")(torch.zeros(1, 4)).shape == (1, 3)
    assert create_model("one_layer", num_classes=5)(torch.zeros(1, 4)).shape == (1, 5)
    with pytest.raises(ValueError, match="'one_layer' is already registered"):
        register_model(spec)(one_layer)


def test_package_exports_the_registry_functions() -> None:
    assert models.create_model is create_model
    assert models.list_models is list_models
    with pytest.raises(AttributeError, match="nonsense"):
        _ = models.nonsense
