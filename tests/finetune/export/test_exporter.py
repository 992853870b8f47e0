"""A network whose probabilities are not finite is not exported, whatever an inference engine computes from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.export.exporter import check_finite
from models.errors import BundleError
from models.networks.classifier import Classifier
from tests.helpers import tiny_network

PIXELS = np.full((2, 32, 32, 3), 128, np.uint8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_with_nan_outputs_are_not_exported(value: float) -> None:
    torch.manual_seed(0)
    classifier = Classifier(tiny_network.Tiny(2), tiny_network.TINY.preprocessing).eval()
    check_finite(classifier, PIXELS)
    with torch.no_grad():
        for parameter in classifier.net.parameters():
            parameter.fill_(value)
    with pytest.raises(BundleError, match=r"are not finite numbers; no bundle was written"):
        check_finite(classifier, PIXELS)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_training_on_such_weights_fails_with_one_sentence_and_no_bundle(value: float, tmp_path: Path) -> None:
    data = tiny_network.color_folder(tmp_path / "data")
    with tiny_network.registered():
        weights = tiny_network.save_weights(tmp_path / "tiny.pth")
        state = torch.load(weights, weights_only=True)
        for tensor in state.values():
            tensor.fill_(value if tensor.is_floating_point() else 1)
        torch.save(state, weights)
        flags = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", tmp_path / "run")
        code, out, err = tiny_network.finetune("train", *flags)
    assert code == 2
    assert (
        "contains NaN or infinity in the tensor 'features.0.weight'" if np.isnan(value) else "became NaN or infinite"
    ) in out + err
    assert not (tmp_path / "run" / "bundle").exists()
