from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.transforms import functional

from models.errors import ConfigError, WeightsError
from models.networks.classifier import Classifier, Normalize, build_classifier, trainable_names
from models.networks.registry import get_spec
from models.networks.weights import load_weights
from models.preprocess import Preprocessing

pytestmark = pytest.mark.slow

StateDict = dict[str, Tensor]
RESNET = get_spec("resnet18")


def some_pixels(count: int) -> Tensor:
    """Random images, smaller than the input size for speed: all these networks pool maps of any size."""
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(random_weights: Callable[[str], StateDict]) -> StateDict:
    return random_weights("resnet18")


# VGG16 from a file


@pytest.fixture(scope="module")
def vgg16(vgg16_weights: Path) -> tuple[Classifier, StateDict]:
    weights = load_weights(get_spec("vgg16"), file=vgg16_weights)
    assert not weights.published
    return build_classifier(get_spec("vgg16"), num_classes=2, base=weights.tensors), weights.tensors


def test_only_the_new_head_of_vgg16_is_trainable(vgg16: tuple[Classifier, StateDict]) -> None:
    net = vgg16[0].net
    assert trainable_names(net) == ["classifier.6.weight", "classifier.6.bias"]
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["classifier.6.weight", "classifier.6.bias"]
    assert net.get_parameter("classifier.6.weight").shape == (2, 4096)
    assert not vgg16[0].training


def test_other_weights_of_vgg16_are_those_of_the_file(vgg16: tuple[Classifier, StateDict]) -> None:
    state, base = vgg16[0].net.state_dict(), vgg16[1]
    assert set(state) == set(base)
    for name in set(base) - {"classifier.6.weight", "classifier.6.bias"}:
        assert torch.equal(state[name], base[name]), name


def test_vgg16_outputs_log_probabilities(vgg16: tuple[Classifier, StateDict]) -> None:
    with torch.inference_mode():
        log_probs = vgg16[0](some_pixels(2))
    assert log_probs.shape == (2, 2)
    assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(2))
    assert len(set(log_probs.flatten().tolist())) == 4


def test_state_dict_loads_into_torchvisions_class(vgg16: tuple[Classifier, StateDict]) -> None:
    with torch.device("meta"):
        plain = torchvision_models.vgg16(num_classes=2)
    plain.load_state_dict(vgg16[0].net.state_dict(), strict=True, assign=True)
    spec, pixels = get_spec("vgg16"), some_pixels(1)
    image = functional.normalize(pixels.permute(0, 3, 1, 2) / 255, spec.preprocessing.mean, spec.preprocessing.std)
    with torch.inference_mode():
        assert torch.allclose(plain.eval()(image).log_softmax(1), vgg16[0](pixels), atol=1e-5)


# Normalization


@pytest.mark.parametrize(
    "preprocessing",
    [Preprocessing(), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), Preprocessing(mean=(0.1307,), std=(0.3081,))],
)
def test_normalization_matches_torchvision(preprocessing: Preprocessing) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(preprocessing.channels, axis=2)
    expected = functional.normalize(functional.to_tensor(pixels), list(preprocessing.mean), list(preprocessing.std))
    normalized = Normalize(preprocessing)(torch.from_numpy(pixels)[None])
    assert normalized.dtype == torch.float32
    assert normalized.shape == (1, preprocessing.channels, 16, 16)
    assert torch.allclose(normalized[0], expected, rtol=0, atol=1e-6)


def test_normalization_has_no_state_dict_entries() -> None:
    assert Normalize(Preprocessing()).state_dict() == {}


# Weights of another network


def without(state: StateDict, name: str) -> StateDict:
    return {key: value for key, value in state.items() if key != name}


INVALID: dict[str, tuple[Callable[[StateDict], StateDict], str]] = {
    "missing tensor": (lambda s: without(s, "layer2.0.conv1.weight"), r"'layer2\.0\.conv1\.weight' is missing"),
    "unknown tensor": (lambda s: s | {"layer5.weight": torch.zeros(1)}, r"'layer5\.weight' is not part of"),
    "different shape": (
        lambda s: s | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
        r"'conv1\.weight' has the shape \(64, 3, 3, 3\), expected \(64, 3, 7, 7\)",
    ),
    "no tensors": (lambda s: {}, "'conv1.weight' is missing among their 0 tensors"),
}


@pytest.mark.parametrize("case", INVALID)
def test_weights_that_do_not_fit_are_rejected_with_the_tensors_name(base: StateDict, case: str) -> None:
    modify, reason = INVALID[case]
    with pytest.raises(WeightsError, match=f"not for resnet18: {reason}.*--backbone"):
        build_classifier(RESNET, num_classes=2, base=modify(base))


def test_weights_of_another_network_are_rejected(random_weights: Callable[[str], StateDict]) -> None:
    with pytest.raises(WeightsError, match=r"not for resnet18: 'conv1\.weight' is missing"):
        build_classifier(RESNET, num_classes=2, base=random_weights("mobilenet_v2"))


def test_weights_with_a_head_of_another_size_are_accepted(base: StateDict) -> None:
    other = base | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    assert build_classifier(RESNET, num_classes=4, base=other)(some_pixels(1)).shape == (1, 4)


def test_weights_without_matching_names_are_loaded_by_order(base: StateDict) -> None:
    """As saved by DataParallel, or by a port of the network."""
    ported = {f"module.{name}": tensor for name, tensor in base.items()}
    results = [build_classifier(RESNET, num_classes=2, base=state)(some_pixels(1)) for state in (base, ported)]
    assert torch.equal(*results)


def test_weights_without_batch_counters_are_accepted(base: StateDict) -> None:
    """PyTorch before 0.4.1 had none, and torchvision's ResNet files are that old."""
    old = {name: tensor for name, tensor in base.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(base)
    assert build_classifier(RESNET, num_classes=2, base=old)(some_pixels(1)).shape == (1, 2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted_to_float32(base: StateDict, kind: torch.dtype) -> None:
    other = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    classifier = build_classifier(RESNET, num_classes=2, base=other)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert classifier(some_pixels(1)).dtype == torch.float32


# Trainable layers


def test_unfrozen_layer_has_trainable_parameters_and_statistics(base: StateDict) -> None:
    names = trainable_names(build_classifier(RESNET, num_classes=2, base=base, unfreeze=["layer4.1.bn2"]).net)
    assert names == [
        *(f"layer4.1.bn2.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize("name", ["layer5", "relu", "", "fc.weight"])
def test_unfreezing_an_unknown_layer_is_rejected(base: StateDict, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--unfreeze: '{name}' is not a layer.*The last layers are .*fc\.$"):
        build_classifier(RESNET, num_classes=2, base=base, unfreeze=[name])


def test_closest_layer_name_is_suggested(base: StateDict) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'layer4'\?"):
        build_classifier(RESNET, num_classes=2, base=base, unfreeze=["layer5"])


def test_all_layers_are_trainable_without_pretrained_weights() -> None:
    net = build_classifier(RESNET, num_classes=2, base=None).net
    assert trainable_names(net) == list(net.state_dict())


# Random numbers


@pytest.mark.parametrize("pretrained", [True, False])
def test_new_weights_depend_on_the_seed_only(base: StateDict, pretrained: bool) -> None:
    def head(seed: int) -> Tensor:
        torch.rand(7)
        tensors: Any = base if pretrained else None
        return build_classifier(RESNET, num_classes=2, base=tensors, seed=seed).net.get_parameter("fc.weight")

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_building_does_not_change_the_global_random_state(base: StateDict) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_classifier(RESNET, num_classes=2, base=base)
    assert torch.equal(torch.rand(1), expected)


def test_new_head_has_torchs_default_initialization(base: StateDict) -> None:
    weight = build_classifier(RESNET, num_classes=50, base=base, seed=0).net.get_parameter("fc.weight")
    bound = 512**-0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert isinstance(weight, nn.Parameter)
