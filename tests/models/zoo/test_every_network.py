"""One walk through the whole registry: what holds for every network, checked on each, on pictures as small as it takes.

ONNX is in test_zoo_end_to_end.py, which exports every network: one of each row at its own size, the others at the smallest.
"""

from __future__ import annotations

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
class Walked:
    """A network on random weights that stand for pretrained ones, with a new head for two classes."""

    spec: ModelSpec
    base: dict[str, Tensor]
    classifier: Classifier
    parts: SplitModel
    pixels: Tensor


@pytest.fixture(scope="module", params=list_models())
def walked(request: pytest.FixtureRequest) -> Iterator[Walked]:
    with made_small(request.param) as spec:
        base = random_state(spec.name)
        classifier = build_classifier(spec, num_classes=2, base=base)
        yield Walked(spec, base, classifier, split_model(classifier), some_pixels(spec))


def test_it_gives_a_row_of_log_probabilities_for_each_picture(walked: Walked) -> None:
    with torch.inference_mode():
        log_probs = walked.classifier(walked.pixels)
    assert log_probs.shape == (2, 2)
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(2))
    assert len(set(log_probs.flatten().tolist())) > 1


def test_its_head_is_replaced_for_five_classes(walked: Walked) -> None:
    five = build_classifier(walked.spec, num_classes=5, base=walked.base)
    with torch.inference_mode():
        assert five(walked.pixels).shape == (2, 5)
    heads = [f"{head}.{tensor}" for head in walked.spec.heads for tensor in ("weight", "bias")]
    assert trainable_names(five.net) == heads


def test_a_gradient_reaches_every_parameter(walked: Walked) -> None:
    torch.manual_seed(0)
    net = create_model(walked.spec.name, num_classes=3)
    images = walked.classifier.normalize(walked.pixels)
    net(images).log_softmax(1)[:, 0].sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_what_runs_once_and_what_is_trained_make_the_whole_network(walked: Walked) -> None:
    with torch.inference_mode():
        features = walked.parts.frozen(walked.pixels)
        assert torch.equal(walked.parts.trainable(features), walked.classifier(walked.pixels))
    assert not any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in walked.parts.frozen.modules())
    assert not any(parameter.requires_grad for parameter in walked.parts.frozen.parameters())
    assert features[0].numel() <= 512 * 13 * 13  # what is cached of a photo: SqueezeNet's map is the largest


def test_training_moves_the_head_and_nothing_else_bit_for_bit(walked: Walked) -> None:
    classifier = build_classifier(walked.spec, num_classes=2, base=walked.base)
    parts = split_model(classifier)
    before = {name: tensor.clone() for name, tensor in classifier.net.state_dict().items()}
    norms = [layer for layer in classifier.modules() if isinstance(layer, _BatchNorm)]
    train_mode(classifier)
    train_mode(parts.trainable)
    assert not any(layer.training for layer in norms)
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(parts.trainable(parts.frozen(walked.pixels)), torch.tensor([0, 1])).backward()
        optimizer.step()
    changed = {name for name, tensor in classifier.net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert changed <= {f"{head}.{tensor}" for head in walked.spec.heads for tensor in ("weight", "bias")}


def test_a_saved_state_dict_makes_the_same_network(walked: Walked, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, walked.classifier.net.state_dict())
    net = create_model(walked.spec.name, num_classes=2)
    net.load_state_dict(load_file(file))
    with torch.inference_mode():
        again = Classifier(net, walked.spec.preprocessing).eval()(walked.pixels)
        assert torch.equal(again, walked.classifier(walked.pixels))


def test_the_layer_for_grad_cam_gives_a_map_that_decides(walked: Walked) -> None:
    """Grad-CAM (Selvaraju et al. 2016): the map, each channel weighted by the mean gradient of a class."""
    spec, seen = walked.spec, {}
    layer = walked.classifier.net.get_submodule(spec.cam_layer)
    hook = layer.register_forward_hook(lambda *a: seen.update(map=a[2]))
    walked.classifier.normalize.register_forward_hook(lambda *a: a[2].requires_grad_())
    log_probs = walked.classifier(walked.pixels)
    hook.remove()
    feature_map = seen["map"]
    assert feature_map.dim() == 4
    (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), feature_map)
    cam = (gradient.mean((2, 3), keepdim=True) * feature_map).sum(1).relu()
    assert cam.shape == (2, *feature_map.shape[2:])
    assert cam.isfinite().all()
    assert gradient.abs().max() > 0
    with torch.no_grad():
        traced = with_outputs(walked.classifier, [(spec.cam_layer, False)])(walked.pixels)[1]
    assert torch.equal(traced, feature_map)
