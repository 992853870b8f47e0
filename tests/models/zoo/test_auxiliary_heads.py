"""Auxiliary heads: present when training from random weights, absent when fine-tuning and serving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from finetune.compute.device import Compute
from finetune.config import Config
from finetune.training.data_loaders import CachedBatches
from finetune.training.trainer import fit, predict
from models.networks.classifier import build_classifier, trainable_names
from models.networks.registry import get_spec
from models.networks.split_point import split_model, train_mode, with_outputs
from tests.helpers.small_networks import made_small, random_state, some_pixels

CPU = Compute(torch.device("cpu"), "fp32")
CONFIG = Config(weights="none", epochs=1, batch_size=4).with_recipe(get_spec("lenet5").recipe)


def test_googlenet_with_random_weights_has_three_outputs_in_training() -> None:
    with made_small("googlenet") as spec:
        classifier = build_classifier(spec, num_classes=3, base=None)
        split = split_model(classifier)
        outputs = split.trainable(split.frozen(some_pixels(spec)))
        assert [output.shape for output in outputs] == [(2, 3)] * 3
        assert not classifier.training
        assert classifier(some_pixels(spec)).shape == (2, 3)
        assert torch.allclose(outputs[0].exp().sum(1), torch.ones(2))


def test_training_changes_the_auxiliary_heads_and_prediction_ignores_them() -> None:
    with made_small("googlenet") as spec:
        classifier = build_classifier(spec, num_classes=2, base=None)
        split = split_model(classifier)
        before = {name: p.detach().clone() for name, p in classifier.net.named_parameters()}
        with torch.no_grad():
            rows = split.frozen(some_pixels(spec, 8)).numpy()
        batches = CachedBatches(rows, [0, 1] * 4, batch_size=4, seed=0)
        names = [f"net.{name}" for name in trainable_names(classifier.net)]
        progress = fit(split.trainable, names, batches, batches, CONFIG, compute=CPU, head=[], aux_weight=classifier.aux_weight)
        assert progress.epoch == 1
        unchanged = [name for name, p in classifier.net.named_parameters() if torch.equal(p, before[name])]
        assert unchanged == []
        log_probs, _ = predict(split.trainable, batches, compute=CPU)
        with torch.inference_mode():
            assert torch.allclose(log_probs, classifier(some_pixels(spec, 8)), atol=1e-5)


def test_auxiliary_loss_is_weighted() -> None:
    """With two identical heads, the gradient of the auxiliary one is that of the main one times the weight."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.main(x).log_softmax(1), self.aux(x).log_softmax(1)

    module = TwoHeads()
    module.aux.load_state_dict(module.main.state_dict())
    before = module.main.weight.detach().clone()
    rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).numpy()
    batches = CachedBatches(rows, [0, 1, 0, 1], batch_size=4, seed=0)
    config = replace(CONFIG, optimizer="sgd", lr=0.1, momentum=0.0)
    fit(module, list(module.state_dict()), batches, batches, config, compute=CPU, head=[], aux_weight=0.3)
    assert torch.allclose(module.aux.weight - before, 0.3 * (module.main.weight - before), atol=1e-6)
    assert not torch.equal(module.main.weight, before)


@pytest.mark.heavy
def test_auxiliary_head_of_inception_v3_gets_a_gradient() -> None:
    spec = get_spec("inception_v3")
    classifier = build_classifier(spec, num_classes=2, base=None)
    split = split_model(classifier)
    train_mode(split.trainable)
    main, aux = split.trainable(split.frozen(some_pixels(spec)))
    assert main.shape == aux.shape == (2, 2)
    torch.nn.functional.nll_loss(aux, torch.tensor([0, 1])).backward()
    assert classifier.net.get_parameter("AuxLogits.fc.weight").grad is not None
    assert classifier.net.get_parameter("fc.weight").grad is None


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_fine_tuned_and_served_networks_have_no_auxiliary_heads(name: str) -> None:
    with made_small(name) as spec:
        classifier = build_classifier(spec, num_classes=2, base=random_state(name))
        assert not [key for key in classifier.net.state_dict() if key.startswith(("aux", "Aux"))]
        assert isinstance(split_model(classifier).trainable(torch.zeros(2, classifier.net.fc.in_features)), torch.Tensor)
        if name == "googlenet":
            trained = build_classifier(spec, num_classes=2, base=None)
            log_probs, embedding = with_outputs(trained, [(spec.head, True)])(some_pixels(spec))
            assert (log_probs.shape, embedding.shape) == ((2, 2), (2, 1024))
