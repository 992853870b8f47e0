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

pytestmark = pytest.mark.slow

StateDict = dict[str, Tensor]
BuildFrom = Callable[..., Classifier]
SPLITS = {
    "alexnet": ("flatten", 9216),
    "resnet18": ("flatten", 512),
    "mobilenet_v2": ("flatten", 1280),
    "efficientnet_lite0": ("global_pool.flatten", 1280),
}


def some_pixels(count: int) -> Tensor:
    """Random images, smaller than the input size for speed: all these networks pool maps of any size."""
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def statistics(net: nn.Module) -> StateDict:
    return {name: tensor.clone() for name, tensor in net.state_dict().items() if "running" in name or "tracked" in name}


def changed_statistics(before: StateDict, net: nn.Module) -> set[str]:
    return {name for name, tensor in statistics(net).items() if not torch.equal(tensor, before[name])}


@pytest.fixture(scope="module")
def build(random_weights: Callable[[str], StateDict]) -> BuildFrom:
    """Builds a classifier with random weights and random BatchNorm statistics."""

    def make(name: str, unfreeze: tuple[str, ...] = ()) -> Classifier:
        generator = torch.Generator().manual_seed(2)
        base = random_weights(name)
        for key in (key for key in base if "running" in key):
            base[key] = torch.empty_like(base[key]).uniform_(0.5, 1.5, generator=generator)
        return build_classifier(get_spec(name), num_classes=3, base=base, unfreeze=unfreeze)

    return make


# The split point


@pytest.mark.parametrize("name", SPLITS)
@torch.inference_mode()
def test_frozen_and_trainable_modules_match_the_network(build: BuildFrom, name: str) -> None:
    classifier, pixels = build(name), some_pixels(2)
    split = split_model(classifier)
    features = split.frozen(pixels)
    assert (split.last_frozen, tuple(features.shape)) == (SPLITS[name][0], (2, SPLITS[name][1]))
    assert torch.equal(split.trainable(features), classifier(pixels))


@torch.inference_mode()
def test_vgg16_is_split_after_the_activation_of_its_first_fully_connected_layer(vgg16_weights: Path) -> None:
    base = load_weights(get_spec("vgg16"), file=vgg16_weights).tensors
    classifier, pixels = build_classifier(get_spec("vgg16"), num_classes=2, base=base), some_pixels(1)
    split = split_model(classifier)
    features = split.frozen(pixels)
    assert (split.last_frozen, tuple(features.shape)) == ("classifier.1", (1, 4096))
    assert torch.equal(split.trainable(features), classifier(pixels))


@pytest.mark.parametrize(
    ("name", "unfreeze", "after"),
    [
        ("resnet18", "layer4", "layer3.1.relu"),
        ("resnet18", "layer4.0.conv2", "layer3.1.relu"),  # inside the block, the shortcut is a second crossing tensor
        ("resnet18", "layer4.1.bn2", "layer4.0.relu"),
        ("mobilenet_v2", "features.18", "features.17.conv.3"),
        ("efficientnet_lite0", "bn2", "conv_head"),
    ],
)
@torch.inference_mode()
def test_unfreezing_moves_the_split_before_the_layer(build: BuildFrom, name: str, unfreeze: str, after: str) -> None:
    classifier, pixels = build(name, (unfreeze,)), some_pixels(2)
    split = split_model(classifier)
    assert split.last_frozen == after
    assert torch.equal(split.trainable(split.frozen(pixels)), classifier(pixels))


@pytest.mark.parametrize("name", SPLITS)
def test_only_normalization_is_frozen_with_random_weights(name: str) -> None:
    with torch.device("meta"):
        classifier = Classifier(create_model(name, num_classes=3), get_spec(name).preprocessing)
    split = split_model(classifier)
    assert split.last_frozen == "normalize"
    assert [str(node.target) for node in split.frozen.graph.nodes if node.op == "call_module"] == ["normalize"]


@pytest.mark.parametrize("name", [*SPLITS, "vgg16"])
def test_every_parameter_belongs_to_a_traced_layer(name: str) -> None:
    """A parameter that is used outside of its layer would silently count as frozen."""
    with torch.device("meta"):
        classifier = Classifier(create_model(name, num_classes=3), get_spec(name).preprocessing)
    layers = dict(classifier.named_modules())
    graph = trace(classifier)
    assert [str(node.target) for node in graph.nodes if node.op == "get_attr"] == []
    traced = {id(p) for node in graph.nodes if node.op == "call_module" for p in layers[str(node.target)].parameters()}
    assert traced == {id(p) for p in classifier.parameters()}


def test_both_modules_share_the_networks_parameters(build: BuildFrom) -> None:
    classifier = build("resnet18")
    split = split_model(classifier)
    assert split.trainable.get_parameter("net.fc.weight") is classifier.net.get_parameter("fc.weight")
    assert split.frozen.get_parameter("net.conv1.weight") is classifier.net.get_parameter("conv1.weight")


# Training


def test_only_trainable_parameters_get_gradients(build: BuildFrom) -> None:
    classifier = build("efficientnet_lite0", ("bn2",))
    split = split_model(classifier)
    train_mode(split.trainable)
    with torch.no_grad():
        features = split.frozen(some_pixels(2))
    split.trainable(features)[:, 0].sum().backward()
    with_gradient = {name for name, p in classifier.net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {"bn2.weight", "bn2.bias", "classifier.weight", "classifier.bias"}


@torch.no_grad()
def test_only_statistics_of_unfrozen_layers_change(build: BuildFrom) -> None:
    classifier = build("resnet18", ("layer4.0",))  # the frozen layer4.1 is in the trainable module
    split = split_model(classifier)
    before = statistics(classifier.net)
    train_mode(split.trainable)
    for _ in range(2):
        split.trainable(split.frozen(some_pixels(4)))
    changed = changed_statistics(before, classifier.net)
    assert {name for name in before if name.startswith("layer4.0.")} == changed
    assert any(name.startswith("layer4.1.") for name in before)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
@torch.no_grad()
def test_all_statistics_change_with_random_weights(name: str) -> None:
    classifier = build_classifier(get_spec(name), num_classes=2, base=None)
    split = split_model(classifier)
    before = statistics(classifier.net)
    train_mode(split.trainable)
    split.trainable(split.frozen(some_pixels(2)))
    assert changed_statistics(before, classifier.net) == set(before)


@torch.no_grad()
def test_frozen_statistics_do_not_change_in_training_mode(build: BuildFrom) -> None:
    classifier = build("mobilenet_v2")
    before = statistics(classifier.net)
    assert any(isinstance(layer, _BatchNorm) for layer in classifier.modules())
    train_mode(classifier)
    assert classifier.net.training
    classifier(some_pixels(2))
    assert changed_statistics(before, classifier.net) == set()


@torch.no_grad()
def test_dropout_is_active_only_in_the_trainable_module_during_training(build: BuildFrom) -> None:
    split = split_model(build("alexnet"))
    train_mode(split.frozen)
    train_mode(split.trainable)
    pixels = some_pixels(1)
    features = split.frozen(pixels)
    assert torch.equal(split.frozen(pixels), features)
    assert not torch.equal(split.trainable(features), split.trainable(features))
    split.trainable.eval()
    assert torch.equal(split.trainable(features), split.trainable(features))


# Additional outputs


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "mobilenet_v2"])
@torch.inference_mode()
def test_with_outputs_adds_the_heads_input_and_the_last_feature_map(build: BuildFrom, name: str) -> None:
    spec, classifier, pixels = get_spec(name), build(name), some_pixels(2)
    expected: dict[str, Tensor] = {}
    head, last = classifier.net.get_submodule(spec.head), classifier.net.get_submodule(spec.cam_layer)
    hooks = (
        head.register_forward_pre_hook(lambda _, args: expected.update(head=args[0])),
        last.register_forward_hook(lambda *a: expected.update(map=a[2])),
    )
    expected["log_probs"] = classifier(pixels)
    for hook in hooks:
        hook.remove()
    log_probs, embedding, feature_map = with_outputs(classifier, [(spec.head, True), (spec.cam_layer, False)])(pixels)
    assert torch.equal(log_probs, expected["log_probs"])
    assert torch.equal(embedding, expected["head"])
    assert torch.equal(feature_map, expected["map"])


@pytest.mark.parametrize(("name", "width"), [("lenet5", 84), ("mobilenet_v1_025", 256)])
@torch.inference_mode()
def test_head_named_output_is_not_confused_with_the_graphs_output_node(name: str, width: int) -> None:
    spec = get_spec(name)
    classifier = build_classifier(spec, num_classes=3, base=None)
    side, channels = spec.preprocessing.input_px, spec.preprocessing.channels
    pixels = torch.randint(0, 256, (2, side, side, channels), dtype=torch.uint8)
    log_probs, embedding = with_outputs(classifier, [(spec.head, True)])(pixels)
    assert embedding.shape == (2, width)
    assert torch.allclose(classifier.net.get_submodule(spec.head)(embedding).log_softmax(1), log_probs, atol=1e-5)
