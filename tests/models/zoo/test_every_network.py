"""Properties that every registered network must have, tested on the smallest possible images.

tests/e2e/test_every_backbone.py covers the ONNX export.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.networks.classifier import Classifier, build_classifier, trainable_names
from models.networks.registry import create_model, list_models
from models.networks.spec import ModelSpec
from models.networks.split_point import SplitModel, split_model, train_mode, with_outputs
from models.networks.weights import write_tensors
from tests.helpers.small_networks import made_small, random_state, some_pixels

pytestmark = pytest.mark.heavy


@dataclass
class Case:
    """A network with random weights in place of pretrained ones, and a new head for two classes."""

    spec: ModelSpec
    base: dict[str, Tensor]
    classifier: Classifier
    split: SplitModel
    pixels: Tensor


@pytest.fixture(scope="module", params=list_models())
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with made_small(request.param) as spec:
        base = random_state(spec.name)
        classifier = build_classifier(spec, num_classes=2, base=base)
        yield Case(spec, base, classifier, split_model(classifier), some_pixels(spec))


def test_outputs_are_log_probabilities(case: Case) -> None:
    with torch.inference_mode():
        log_probs = case.classifier(case.pixels)
    assert log_probs.shape == (2, 2)
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(2))
    assert len(set(log_probs.flatten().tolist())) > 1


def test_head_is_replaced_for_five_classes(case: Case) -> None:
    five = build_classifier(case.spec, num_classes=5, base=case.base)
    with torch.inference_mode():
        assert five(case.pixels).shape == (2, 5)
    heads = [f"{head}.{tensor}" for head in case.spec.heads for tensor in ("weight", "bias")]
    assert trainable_names(five.net) == heads


def test_every_parameter_gets_a_gradient(case: Case) -> None:
    torch.manual_seed(0)
    net = copy.deepcopy(case.classifier.net).train().requires_grad_()
    images = case.classifier.normalize(case.pixels)
    net(images).log_softmax(1)[:, 0].sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_frozen_and_trainable_modules_match_the_network(case: Case) -> None:
    with torch.inference_mode():
        features = case.split.frozen(case.pixels)
        assert torch.equal(case.split.trainable(features), case.classifier(case.pixels))
    assert not any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in case.split.frozen.modules())
    assert not any(parameter.requires_grad for parameter in case.split.frozen.parameters())
    assert features[0].numel() <= 512 * 13 * 13  # cached per image; SqueezeNet's feature map is the largest


def test_training_changes_only_the_head(case: Case) -> None:
    classifier = build_classifier(case.spec, num_classes=2, base=case.base)
    split = split_model(classifier)
    before = {name: tensor.clone() for name, tensor in classifier.net.state_dict().items()}
    norms = [layer for layer in classifier.modules() if isinstance(layer, _BatchNorm)]
    train_mode(classifier)
    train_mode(split.trainable)
    assert not any(layer.training for layer in norms)
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(split.trainable(split.frozen(case.pixels)), torch.tensor([0, 1])).backward()
        optimizer.step()
    changed = {name for name, tensor in classifier.net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert changed <= {f"{head}.{tensor}" for head in case.spec.heads for tensor in ("weight", "bias")}


def test_saved_state_dict_restores_the_network(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, case.classifier.net.state_dict())
    with torch.device("meta"):
        net = create_model(case.spec.name, num_classes=2)
    net.load_state_dict(load_file(file), assign=True)
    with torch.inference_mode():
        again = Classifier(net, case.spec.preprocessing).eval()(case.pixels)
        assert torch.equal(again, case.classifier(case.pixels))


def test_cam_layer_has_a_feature_map_with_gradients(case: Case) -> None:
    """Grad-CAM (Selvaraju et al. 2016, https://arxiv.org/abs/1610.02391) weights each channel by a class's mean gradient."""
    spec, captured = case.spec, {}
    layer = case.classifier.net.get_submodule(spec.cam_layer)
    hook = layer.register_forward_hook(lambda *a: captured.update(map=a[2]))
    case.classifier.normalize.register_forward_hook(lambda *a: a[2].requires_grad_())
    log_probs = case.classifier(case.pixels)
    hook.remove()
    feature_map = captured["map"]
    assert feature_map.dim() == 4
    (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), feature_map)
    cam = (gradient.mean((2, 3), keepdim=True) * feature_map).sum(1).relu()
    assert cam.shape == (2, *feature_map.shape[2:])
    assert cam.isfinite().all()
    assert gradient.abs().max() > 0
    with torch.no_grad():
        traced = with_outputs(case.classifier, [(spec.cam_layer, False)])(case.pixels)[1]
    assert torch.equal(traced, feature_map)
