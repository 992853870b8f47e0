"""``finetune train`` gives the result of the textbook loop in docs/recipes, with the same seed and without dropout."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from models.networks import registry
from models.networks.registry import create_model
from tests.helpers.small_networks import made_small, random_state
from tests.helpers.tiny_network import color_folder, finetune

pytestmark = pytest.mark.slow

EPOCHS, BATCH_SIZE, SIDE_PX = 3, 4, 32
# The textbook loop runs all layers in PyTorch; finetune runs the frozen ones in OpenVINO, which sums in another order, and
# resizes one axis at a time, which rounds a few pixels differently by one level of 255.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def textbook() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "docs" / "recipes" / "textbook_loop.py"
    spec = importlib.util.spec_from_file_location("textbook_loop", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_dropout(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return net


def test_it_matches_the_textbook_loop(textbook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.reports.plot_process.PlotProcess.start", lambda *a, **k: None)
    data = color_folder(tmp_path / "data", train=7, valid=3)
    with made_small("vgg16"), pytest.MonkeyPatch.context() as patch:
        spec, build = registry._entry("vgg16")
        patch.setitem(registry._ENTRIES, "vgg16", (spec, lambda *a, **k: without_dropout(build(*a, **k))))
        assert spec.preprocessing.input_px == SIDE_PX
        weights = random_state("vgg16")
        torch.save(weights, tmp_path / "vgg16.pth")
        model = create_model("vgg16")
        model.load_state_dict(weights)
        flags = ("--data-dir", data, "--weights", tmp_path / "vgg16.pth", "--cache-dir", tmp_path / "cache")
        flags += ("--epochs", EPOCHS, "--batch-size", BATCH_SIZE, "--output-dir", tmp_path / "run")
        code, _, err = finetune("train", *flags)
    assert (code, err) == (0, "")

    photos = [textbook.open_photos(data / split, SIDE_PX, SIDE_PX) for split in ("train", "valid")]
    textbook.replace_head(model, num_classes=2)
    start = model.classifier[6][0].weight.detach().clone()
    expected = textbook.fit(model, *photos, EPOCHS, BATCH_SIZE)

    last = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["last"]
    theirs = model.classifier[6][0].state_dict()
    assert (theirs["weight"] - start).abs().max() > 10 * TOLERANCE  # training has moved the weights
    for name in ("weight", "bias"):
        torch.testing.assert_close(last[f"net.classifier.6.{name}"], theirs[name], atol=TOLERANCE, rtol=0)
    with (tmp_path / "run" / "history.csv").open(newline="") as file:
        rows = [[float(row[key]) for key in ("train_loss", "valid_loss", "valid_accuracy")] for row in csv.DictReader(file)]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected), atol=TOLERANCE, rtol=0)
