from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.networks.classifier import Classifier, build_classifier
from models.networks.registry import create_model, get_spec
from models.networks.split_point import split_model, trace, train_mode, with_outputs
from models.networks.weights import load_weights

StateDict = dict[str, Tensor]
BuildFrom = Callable[..., Classifier]
CUTS = {
    "alexnet": ("flatten", 9216),
    "resnet18": ("flatten", 512),
    "mobilenet_v2": ("flatten", 1280),
    "efficientnet_lite0": ("global_pool.flatten", 1280),
}


def some_pixels(count: int) -> Tensor:
    """Small ones, for speed: all networks pool whatever map they get."""
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def statistics(net: nn.Module) -> StateDict:
    return {name: tensor.clone() for name, tensor in net.state_dict().items() if "running" in name or "tracked" in name}


def moved(before: StateDict, net: nn.Module) -> set[str]:
    """The names of the statistics that are not what they were."""
    return {name for name, tensor in statistics(net).items() if not torch.equal(tensor, before[name])}


@pytest.fixture(scope="module")
def build(random_weights: Callable[[str], StateDict]) -> BuildFrom:
    """A classifier on weights that are random, as are the statistics of its BatchNorm."""

    def make(name: str, unfreeze: tuple[str, ...] = ()) -> Classifier:
        numbers = torch.Generator().manual_seed(2)
        base = random_weights(name)
        for key in (key for key in base if "running" in key):
            base[key] = torch.empty_like(base[key]).uniform_(0.5, 1.5, generator=numbers)
        return build_classifier(get_spec(name), num_classes=3, base=base, unfreeze=unfreeze)

    return make


# Where the cut is


@pytest.mark.parametrize("name", CUTS)
@torch.inference_mode()
def test_frozen_then_trained_is_the_whole_network(build: BuildFrom, name: str) -> None:
    classifier, pixels = build(name), some_pixels(2)
    parts = split_model(classifier)
    features = parts.frozen(pixels)
    assert (parts.last_frozen, tuple(features.shape)) == (CUTS[name][0], (2, CUTS[name][1]))
    assert torch.equal(parts.trainable(features), classifier(pixels))


@torch.inference_mode()
def test_vgg16_is_cut_behind_its_first_fully_connected_layers_activation(vgg16_weights: Path) -> None:
    base = load_weights(get_spec("vgg16"), file=vgg16_weights).tensors
    classifier, pixels = build_classifier(get_spec("vgg16"), num_classes=2, base=base), some_pixels(1)
    parts = split_model(classifier)
    features = parts.frozen(pixels)
    assert (parts.last_frozen, tuple(features.shape)) == ("classifier.1", (1, 4096))
    assert torch.equal(parts.trainable(features), classifier(pixels))


@pytest.mark.parametrize(
    ("name", "unfreeze", "after"),
    [
        ("resnet18", "layer4", "layer3.1.relu"),
        ("resnet18", "layer4.0.conv2", "layer3.1.relu"),  # the block's shortcut passes by: two tensors cross inside
        ("resnet18", "layer4.1.bn2", "layer4.0.relu"),
        ("mobilenet_v2", "features.18", "features.17.conv.3"),
        ("efficientnet_lite0", "bn2", "conv_head"),
    ],
)
@torch.inference_mode()
def test_unfreezing_moves_the_cut_before_the_layer(build: BuildFrom, name: str, unfreeze: str, after: str) -> None:
    classifier, pixels = build(name, (unfreeze,)), some_pixels(2)
    parts = split_model(classifier)
    assert parts.last_frozen == after
    assert torch.equal(parts.trainable(parts.frozen(pixels)), classifier(pixels))


@pytest.mark.parametrize("name", CUTS)
def test_from_random_weights_only_normalisation_comes_before_the_cut(name: str) -> None:
    with torch.device("meta"):
        classifier = Classifier(create_model(name, num_classes=3), get_spec(name).preprocessing)
    parts = split_model(classifier)
    assert parts.last_frozen == "normalize"
    assert [str(node.target) for node in parts.frozen.graph.nodes if node.op == "call_module"] == ["normalize"]


@pytest.mark.parametrize("name", [*CUTS, "vgg16"])
def test_every_parameter_is_read_by_a_layer_that_the_trace_sees(name: str) -> None:
    """One that is read past its layer would count as frozen, and would be, without a word."""
    with torch.device("meta"):
        classifier = Classifier(create_model(name, num_classes=3), get_spec(name).preprocessing)
    layers = dict(classifier.named_modules())
    graph = trace(classifier)
    assert [str(node.target) for node in graph.nodes if node.op == "get_attr"] == []
    seen = {id(p) for node in graph.nodes if node.op == "call_module" for p in layers[str(node.target)].parameters()}
    assert seen == {id(p) for p in classifier.parameters()}


def test_both_parts_share_the_networks_parameters(build: BuildFrom) -> None:
    classifier = build("resnet18")
    parts = split_model(classifier)
    assert parts.trainable.get_parameter("net.fc.weight") is classifier.net.get_parameter("fc.weight")
    assert parts.frozen.get_parameter("net.conv1.weight") is classifier.net.get_parameter("conv1.weight")


# Training


def test_what_learns_gets_a_gradient_and_nothing_else(build: BuildFrom) -> None:
    classifier = build("efficientnet_lite0", ("bn2",))
    parts = split_model(classifier)
    train_mode(parts.trainable)
    with torch.no_grad():
        features = parts.frozen(some_pixels(2))
    parts.trainable(features)[:, 0].sum().backward()
    learnt = {name for name, p in classifier.net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learnt == {"bn2.weight", "bn2.bias", "classifier.weight", "classifier.bias"}


@torch.no_grad()
def test_statistics_of_unfrozen_layers_move_and_those_of_frozen_ones_stay(build: BuildFrom) -> None:
    classifier = build("resnet18", ("layer4.0",))  # the frozen layer4.1 is in the trained part
    parts = split_model(classifier)
    before = statistics(classifier.net)
    train_mode(parts.trainable)
    for _ in range(2):
        parts.trainable(parts.frozen(some_pixels(4)))
    changed = moved(before, classifier.net)
    assert {name for name in before if name.startswith("layer4.0.")} == changed
    assert any(name.startswith("layer4.1.") for name in before)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
@torch.no_grad()
def test_from_random_weights_all_statistics_move(name: str) -> None:
    classifier = build_classifier(get_spec(name), num_classes=2, base=None)
    parts = split_model(classifier)
    before = statistics(classifier.net)
    train_mode(parts.trainable)
    parts.trainable(parts.frozen(some_pixels(2)))
    assert moved(before, classifier.net) == set(before)


@torch.no_grad()
def test_training_the_whole_network_leaves_frozen_statistics_as_they_are(build: BuildFrom) -> None:
    classifier = build("mobilenet_v2")
    before = statistics(classifier.net)
    assert any(isinstance(layer, _BatchNorm) for layer in classifier.modules())
    train_mode(classifier)
    assert classifier.net.training
    classifier(some_pixels(2))
    assert moved(before, classifier.net) == set()


@torch.no_grad()
def test_dropout_is_random_behind_the_cut_alone_and_off_in_evaluation(build: BuildFrom) -> None:
    parts = split_model(build("alexnet"))
    train_mode(parts.frozen)
    train_mode(parts.trainable)
    pixels = some_pixels(1)
    features = parts.frozen(pixels)
    assert torch.equal(parts.frozen(pixels), features)
    assert not torch.equal(parts.trainable(features), parts.trainable(features))
    parts.trainable.eval()
    assert torch.equal(parts.trainable(features), parts.trainable(features))


# More outputs


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "mobilenet_v2"])
@torch.inference_mode()
def test_the_heads_input_and_the_last_map_are_given_beside_the_answer(build: BuildFrom, name: str) -> None:
    spec, classifier, pixels = get_spec(name), build(name), some_pixels(2)
    seen: dict[str, Tensor] = {}
    head, last = classifier.net.get_submodule(spec.head), classifier.net.get_submodule(spec.cam_layer)
    hooks = (
        head.register_forward_pre_hook(lambda _, given: seen.update(head=given[0])),
        last.register_forward_hook(lambda *a: seen.update(map=a[2])),
    )
    whole = classifier(pixels)
    for hook in hooks:
        hook.remove()
    log_probs, embedding, feature_map = with_outputs(classifier, [(spec.head, True), (spec.cam_layer, False)])(pixels)
    assert torch.equal(log_probs, whole)
    assert torch.equal(embedding, seen["head"])
    assert torch.equal(feature_map, seen["map"])


@pytest.mark.parametrize(("name", "width"), [("lenet5", 84), ("mobilenet_v1_025", 256)])
@torch.inference_mode()
def test_a_head_that_is_called_output_is_not_taken_for_the_graphs_own(name: str, width: int) -> None:
    spec = get_spec(name)
    classifier = build_classifier(spec, num_classes=3, base=None)
    side, channels = spec.preprocessing.input_px, spec.preprocessing.channels
    pixels = torch.randint(0, 256, (2, side, side, channels), dtype=torch.uint8)
    log_probs, embedding = with_outputs(classifier, [(spec.head, True)])(pixels)
    assert embedding.shape == (2, width)
    assert torch.allclose(classifier.net.get_submodule(spec.head)(embedding).log_softmax(1), log_probs, atol=1e-5)
