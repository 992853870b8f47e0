"""Training from random weights with ``finetune train``."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from finetune.compute.device import Compute
from finetune.config import Config
from finetune.data.image_folder import Sample, read_dataset
from finetune.data.pixel_memory import PixelMemory
from finetune.training.data_loaders import epoch_order
from finetune.training.setup import make_batches, prepare_dataset, prepare_network
from finetune.training.trainer import make_optimizer
from models.networks.registry import create_model, get_spec
from models.preprocess import decode
from tests.helpers.tiny_network import color_folder, finetune, paint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=12, valid=4)


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


def test_images_are_decoded_once_if_they_fit_in_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def counting(data: bytes, **options: object) -> Image.Image:
        decoded.append(data)
        return decode(data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("finetune.data.inspection.decode", counting)
    monkeypatch.setattr("models.preprocess.decode", counting)
    spec = get_spec("lenet5")
    config = Config(data_dir=data, backbone="lenet5", weights="none", cache_dir=tmp_path / "cache").with_recipe(spec.recipe)
    compute = Compute(torch.device("cpu"), "fp32")
    network = prepare_network(spec, 2, config, compute)
    prepared = prepare_dataset(config, read_dataset(data), network, None)
    batches = {split: make_batches(config, network, None, prepared, split) for split in ("train", "valid")}
    assert len(decoded) == len(set(decoded)) == 24 + 8
    for split, loader in batches.items():
        first, again = (torch.cat([rows for rows, _ in loader.ordered()]) for _ in range(2))
        assert first.shape == (len(prepared.splits[split]), 1, 28, 28)
        assert torch.equal(first, again)
        expected = [spec.preprocessing.pixels(record.sample.path.read_bytes()) for record in prepared.splits[split]]
        assert torch.equal(first, torch.from_numpy(network.extractor.run(np.stack(expected))))
        shuffled = torch.cat([rows for rows, _ in loader.shuffled(1)])
        assert torch.equal(shuffled, first[epoch_order(torch.zeros(len(first), dtype=torch.long), config.seed, 1)])
    assert len(set(decoded)) == 24 + 8


def test_images_that_do_not_fit_in_memory_are_decoded_in_every_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("train", "--data-dir", data, "--backbone", "lenet5", "--epochs", 2, "--cache-dir", tmp_path / "cache")
    weights = []
    for name in ("memory", "disk"):
        code, _, err = finetune(*flags, "--output-dir", tmp_path / name)
        assert (code, err) == (0, "")
        weights.append(load_file(tmp_path / name / "bundle" / "model.safetensors"))
        monkeypatch.setattr("finetune.data.pixel_memory.MAX_BYTES", 0)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("size", "is_in_memory"), [((28, 28), True), ((30, 28), False)])
def test_crops_of_images_in_memory_require_images_of_the_input_size(
    size: tuple[int, int], is_in_memory: bool, tmp_path: Path
) -> None:
    files = [paint(tmp_path / f"{i}.png", (250, 30, 30), seed=i, size=size) for i in range(2)]
    samples = [Sample(file.name, file, 0, "train") for file in files]
    memory = PixelMemory(get_spec("lenet5").preprocessing)
    assert memory.can_hold(samples, augmented=True) is is_in_memory
    assert memory.can_hold(samples, augmented=False)


def test_bfloat16_runs_all_layers_if_all_are_trained() -> None:
    """The weights stay float32. A new head on frozen layers is trained in float32 on a CPU."""
    layer = torch.nn.Linear(4, 2)
    for from_scratch, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with Compute(torch.device("cpu"), "bf16", from_scratch).autocast():
            assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_settings_override_the_recipe(tmp_path: Path) -> None:
    config = Config(optimizer="sgd", epochs=2).with_recipe(get_spec("lenet5").recipe)
    assert (config.optimizer, config.epochs, config.batch_size) == ("sgd", 2, 16)
    assert replace(config, lr=0.9).lr == 0.9
