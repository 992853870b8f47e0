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

StateDict = dict[str, Tensor]
RESNET = get_spec("resnet18")


def some_pixels(count: int) -> Tensor:
    """Small ones, for speed: all networks pool whatever map they get."""
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


def test_only_vgg16s_new_head_is_trained(vgg16: tuple[Classifier, StateDict]) -> None:
    net = vgg16[0].net
    assert trainable_names(net) == ["classifier.6.weight", "classifier.6.bias"]
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["classifier.6.weight", "classifier.6.bias"]
    assert net.get_parameter("classifier.6.weight").shape == (2, 4096)
    assert not vgg16[0].training


def test_the_rest_of_vgg16_is_the_files(vgg16: tuple[Classifier, StateDict]) -> None:
    state, given = vgg16[0].net.state_dict(), vgg16[1]
    assert set(state) == set(given)
    for name in set(given) - {"classifier.6.weight", "classifier.6.bias"}:
        assert torch.equal(state[name], given[name]), name


def test_vgg16_gives_log_probabilities(vgg16: tuple[Classifier, StateDict]) -> None:
    with torch.inference_mode():
        log_probs = vgg16[0](some_pixels(2))
    assert log_probs.shape == (2, 2)
    assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(2))
    assert len(set(log_probs.flatten().tolist())) == 4


def test_its_state_dict_loads_into_torchvisions_own_class(vgg16: tuple[Classifier, StateDict]) -> None:
    with torch.device("meta"):
        plain = torchvision_models.vgg16(num_classes=2)
    plain.load_state_dict(vgg16[0].net.state_dict(), strict=True, assign=True)
    spec, pixels = get_spec("vgg16"), some_pixels(1)
    image = functional.normalize(pixels.permute(0, 3, 1, 2) / 255, spec.preprocessing.mean, spec.preprocessing.std)
    with torch.inference_mode():
        assert torch.allclose(plain.eval()(image).log_softmax(1), vgg16[0](pixels), atol=1e-5)


# Normalisation


@pytest.mark.parametrize(
    "wanted",
    [Preprocessing(), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), Preprocessing(mean=(0.1307,), std=(0.3081,))],
)
def test_normalisation_is_torchvisions(wanted: Preprocessing) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(wanted.channels, axis=2)
    reference = functional.normalize(functional.to_tensor(pixels), list(wanted.mean), list(wanted.std))
    ours = Normalize(wanted)(torch.from_numpy(pixels)[None])
    assert ours.dtype == torch.float32
    assert ours.shape == (1, wanted.channels, 16, 16)
    assert torch.allclose(ours[0], reference, rtol=0, atol=1e-6)


def test_normalisation_adds_nothing_to_the_state_dict() -> None:
    assert Normalize(Preprocessing()).state_dict() == {}


# Weights of another network


def without(state: StateDict, name: str) -> StateDict:
    return {key: value for key, value in state.items() if key != name}


WRONG: dict[str, tuple[Callable[[StateDict], StateDict], str]] = {
    "one is missing": (lambda s: without(s, "layer2.0.conv1.weight"), r"'layer2\.0\.conv1\.weight' is missing"),
    "one is too many": (lambda s: s | {"layer5.weight": torch.zeros(1)}, r"'layer5\.weight' is not part of"),
    "one has another shape": (
        lambda s: s | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
        r"'conv1\.weight' is \(64, 3, 3, 3\) and should be \(64, 3, 7, 7\)",
    ),
    "there are none": (lambda s: {}, "'conv1.weight' is missing among their 0 tensors"),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_do_not_fit_are_refused_by_the_tensors_name(base: StateDict, what: str) -> None:
    spoil, reason = WRONG[what]
    with pytest.raises(WeightsError, match=f"not resnet18's: {reason}.*--backbone"):
        build_classifier(RESNET, num_classes=2, base=spoil(base))


def test_weights_of_another_network_are_refused(random_weights: Callable[[str], StateDict]) -> None:
    with pytest.raises(WeightsError, match=r"not resnet18's: 'conv1\.weight' is missing"):
        build_classifier(RESNET, num_classes=2, base=random_weights("mobilenet_v2"))


def test_weights_with_a_head_of_another_size_are_accepted(base: StateDict) -> None:
    other = base | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    assert build_classifier(RESNET, num_classes=4, base=other)(some_pixels(1)).shape == (1, 4)


def test_weights_whose_names_are_all_others_go_by_their_order(base: StateDict) -> None:
    """As DataParallel saves them, or a port of the network by other hands."""
    ported = {f"module.{name}": tensor for name, tensor in base.items()}
    results = [build_classifier(RESNET, num_classes=2, base=state)(some_pixels(1)) for state in (base, ported)]
    assert torch.equal(*results)


def test_weights_without_batch_counters_are_accepted(base: StateDict) -> None:
    """PyTorch before 0.4.1 had none; torchvision's ResNet files are that old."""
    old = {name: tensor for name, tensor in base.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(base)
    assert build_classifier(RESNET, num_classes=2, base=old)(some_pixels(1)).shape == (1, 2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(base: StateDict, kind: torch.dtype) -> None:
    other = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    classifier = build_classifier(RESNET, num_classes=2, base=other)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert classifier(some_pixels(1)).dtype == torch.float32


# What is trained


def test_unfreezing_a_layer_trains_it_and_moves_its_statistics(base: StateDict) -> None:
    names = trainable_names(build_classifier(RESNET, num_classes=2, base=base, unfreeze=["layer4.1.bn2"]).net)
    assert names == [
        *(f"layer4.1.bn2.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize("name", ["layer5", "relu", "", "fc.weight"])
def test_unfreezing_a_layer_that_is_not_there_is_answered_with_those_that_are(base: StateDict, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--unfreeze names '{name}'.*The last ones are .*fc\.$"):
        build_classifier(RESNET, num_classes=2, base=base, unfreeze=[name])


def test_the_nearest_layer_is_proposed(base: StateDict) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'layer4'\?"):
        build_classifier(RESNET, num_classes=2, base=base, unfreeze=["layer5"])


def test_without_pretrained_weights_everything_is_trained() -> None:
    net = build_classifier(RESNET, num_classes=2, base=None).net
    assert trainable_names(net) == list(net.state_dict())


# Random numbers


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_seed_gives_the_same_new_weights_whatever_was_drawn_before(base: StateDict, pretrained: bool) -> None:
    def head(seed: int) -> Tensor:
        torch.rand(7)
        given: Any = base if pretrained else None
        return build_classifier(RESNET, num_classes=2, base=given, seed=seed).net.get_parameter("fc.weight")

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_building_leaves_the_callers_random_numbers_alone(base: StateDict) -> None:
    torch.manual_seed(3)
    undisturbed = torch.rand(1)
    torch.manual_seed(3)
    build_classifier(RESNET, num_classes=2, base=base)
    assert torch.equal(torch.rand(1), undisturbed)


def test_a_new_head_is_drawn_as_torch_draws_a_layer(base: StateDict) -> None:
    weight = build_classifier(RESNET, num_classes=50, base=base, seed=0).net.get_parameter("fc.weight")
    bound = 512**-0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert isinstance(weight, nn.Parameter)
