"""Training from random weights with ``finetune train``."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune.compute.device import Compute
from finetune.config import Config
from finetune.data.image_folder import Sample
from finetune.data.inspection import ImageRecord
from finetune.features.extractor import FeatureExtractor
from finetune.training.data_loaders import UncachedBatches
from finetune.training.trainer import make_optimizer
from models.artifacts.atomic_io import sha256_of
from models.networks.classifier import Classifier
from models.networks.registry import create_model, get_spec
from models.networks.split_point import split_model
from tests.helpers.tiny_network import color_folder, finetune, paint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=12, valid=4)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.reports.results.write_plots", lambda *a, **k: None)


def test_network_without_pretrained_weights_is_trained_from_random_ones(data: Path, tmp_path: Path) -> None:
    arguments = ("train", "--data-dir", data, "--backbone", "lenet_cifar", "--epochs", 12, "--batch-size", 4)
    code, output, err = finetune(*arguments, "--output-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    (line,) = (line for line in output.splitlines() if "frozen" in line)
    assert line.startswith("No feature cache because all weights are trained and nothing is frozen")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["weights"], settings["optimizer"], settings["lr"], settings["augment"]) == ("none", "adam", 0.001, False)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"]["value"] == 1.0
    manifest = json.loads((tmp_path / "run" / "bundle" / "manifest.json").read_text())
    assert manifest["base"] is None
    assert "Adam with learning rate 0.001" in (tmp_path / "run" / "bundle" / "README.md").read_text()
    net = create_model("lenet_cifar", num_classes=2)
    net.load_state_dict(load_file(tmp_path / "run" / "bundle" / "model.safetensors"))


def test_resumed_run_from_random_weights_matches_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    """The checkpoint includes Adam's state."""
    arguments = ("train", "--data-dir", data, "--backbone", "cnn_mnist", "--batch-size", 4)
    weights = []
    for name, steps in (("uninterrupted", [4]), ("resumed", [2, 4])):
        for number, epochs in enumerate(steps):
            resume = ("--resume",) if number else ()
            if number:
                shutil.rmtree(tmp_path / name / "bundle")
            code, _, err = finetune(*arguments, "--output-dir", tmp_path / name, "--epochs", epochs, *resume)
            assert (code, err) == (0, "")
        weights.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["last"])
        with (tmp_path / name / "history.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 4
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_weights_file_freezes_a_small_network(data: Path, tmp_path: Path) -> None:
    torch.save(create_model("lenet5").state_dict(), tmp_path / "lenet5.pth")
    arguments = ("train", "--data-dir", data, "--backbone", "lenet5", "--weights", tmp_path / "lenet5.pth", "--epochs", 1)
    code, output, err = finetune(*arguments, "--output-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "Features are computed once per photo, up to sigmoid4." in output


def test_head_export_requires_pretrained_weights(data: Path, tmp_path: Path) -> None:
    code, _, err = finetune(
        "train", "--data-dir", data, "--backbone", "lenet5", "--export", "head", "--output-dir", tmp_path / "run"
    )
    assert code == 2
    assert "--export head omits the pretrained weights, but LeNet-5 has none" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_optimizer_matches_the_config(name: str, kind: type) -> None:
    config = Config(weights="none", optimizer=name, lr=0.25, weight_decay=0.5).with_recipe(get_spec("lenet5").recipe)
    optimizer = make_optimizer(create_model("lenet5"), config, head=[])
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["scale"]) == (0.25, 0.5, 1.0)


def test_unknown_optimizer_error_suggests_the_closest_one(data: Path) -> None:
    code, _, err = finetune("train", "--data-dir", data, "--optimizer", "adma")
    assert code == 2
    assert "--optimizer must be one of sgd, adam (got 'adma'). Did you mean 'adam'?" in err


def test_images_are_decoded_once_if_they_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = get_spec("lenet5")
    files = [paint(tmp_path / f"{i}.jpg", (250, 30, 30), seed=i) for i in range(3)]
    records = [ImageRecord(Sample(file.name, file, 0, "train"), sha256_of(file), None, None) for file in files]
    decoded: list[int] = []
    pixels = type(spec.preprocessing).pixels
    monkeypatch.setattr(type(spec.preprocessing), "pixels", lambda self, data: (decoded.append(1), pixels(self, data))[1])
    split = split_model(Classifier(create_model("lenet5", num_classes=2), spec.preprocessing))
    frozen = FeatureExtractor(split, spec.preprocessing, Compute(torch.device("cpu"), "fp32"))
    batches = UncachedBatches(
        records, preprocessing=spec.preprocessing, frozen=frozen, augment=None, batch_size=2, seed=0, workers=1
    )
    first, again = (torch.cat([rows for rows, _ in batches.ordered()]) for _ in range(2))
    assert first.shape == (3, 1, 28, 28)
    assert torch.equal(first, again)
    assert len(decoded) == 3


def test_settings_override_the_recipe(tmp_path: Path) -> None:
    config = Config(optimizer="sgd", epochs=2).with_recipe(get_spec("lenet5").recipe)
    assert (config.optimizer, config.epochs, config.batch_size) == ("sgd", 2, 16)
    assert replace(config, lr=0.9).lr == 0.9
