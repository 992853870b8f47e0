"""Complete training runs through the command line, from an image folder to a bundle."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision import transforms

from finetune.compute.device import select_compute
from finetune.config import Config
from finetune.training.setup import build_feature_cache, prepare_network
from models.artifacts.bundle import Bundle, open_bundle
from models.networks.weights import read_tensors
from models.runtime.openvino_engine import OpenVINOEngine
from tests.conftest import PhotoFolder
from tests.helpers.tiny_network import TINY, Tiny, color_folder, finetune

pytestmark = pytest.mark.slow

MEASURES = ("accuracy", "log_loss", "roc_auc", "calibration_error", "log_loss_uncalibrated", "calibration_error_uncalibrated")


def train(data: Path, out: Path, *flags: object, plots: bool = False) -> SimpleNamespace:
    """Train a network.

    Returns:
        The run directory, its bundle, the printed output and the data folder.
    """
    code, printed, errors = finetune("train", "--data-dir", data, "--output-dir", out, *flags, plots=plots)
    assert (code, errors) == (0, "")
    return SimpleNamespace(folder=out, bundle=open_bundle(out / "bundle"), printed=printed, data=data)


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    return load_file(bundle.path / "model.safetensors")


def predictions_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def changed_tensors(bundle: Bundle, base: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that differ from the pretrained weights in any bit."""
    ours = weights_of(bundle)
    assert ours.keys() == base.keys()
    return {name for name in ours if not torch.equal(ours[name], base[name])}


def file_contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield every file with its bytes, and the arrays of compressed files."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file, file.read_bytes()
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                yield from ((file, arrays[name].tobytes()) for name in arrays.files)


def assert_contains_no_local_paths(folder: Path, *, run: SimpleNamespace) -> None:
    paths = {
        str(run.data),
        str(run.folder),
        sys.prefix,
        str(Path(__file__).resolve().parents[2]),
        str(Path.home()),
        str(Path.cwd()),
    }
    for file, data in file_contents(folder):
        for path in paths - {"/", "/usr"}:
            assert path.encode() not in data, f"{file.name} contains {path}"


# EfficientNet-Lite0 needs no download; it is exported without its pretrained weights


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory, photo_folder: PhotoFolder) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("lite")
    data = photo_folder(folder / "pets", train=8, valid=4)
    return train(
        data,
        folder / "run",
        "--backbone",
        "efficientnet_lite0",
        "--epochs",
        3,
        "--export",
        "head",
        "--name",
        "pets",
        plots=True,
    )


def test_a_run_writes_the_files_that_it_prints(lite: SimpleNamespace) -> None:
    assert {path.name for path in lite.folder.iterdir()} == {
        "config.yaml",
        "audit.json",
        "checkpoint.pt",
        "history.csv",
        "metrics.json",
        "predictions.csv",
        "embeddings.npz",
        "duplicates.csv",
        "plots",
        "bundle",
    }
    for name in ("bundle", "metrics.json", "predictions.csv", "plots"):
        assert str(lite.folder / name) in lite.printed
    assert "Features are computed once per photo, up to" in lite.printed
    assert len((lite.folder / "history.csv").read_text().splitlines()) == 1 + 3


def test_plots_are_images(lite: SimpleNamespace) -> None:
    names = {path.name for path in (lite.folder / "plots").iterdir()}
    assert {"learning_curves.png", "confusion_matrix.png", "reliability.png", "least_certain_cats.png"} <= names
    for name in names:
        with Image.open(lite.folder / "plots" / name) as image:
            assert min(image.size) > 300


def test_a_head_only_bundle_is_small_and_contains_no_plots(lite: SimpleNamespace) -> None:
    files = {path.name for path in lite.bundle.path.rglob("*")}
    assert files == {
        "manifest.json",
        "head.safetensors",
        "predictions.csv",
        "embeddings.npz",
        "duplicates.csv",
        "golden.npz",
        "ood.npz",
        "ood_scores.npz",
        "README.md",
    }
    assert sum(path.stat().st_size for path in lite.bundle.path.iterdir()) < 200_000
    assert lite.bundle.is_head_only
    assert set(load_file(lite.bundle.path / "head.safetensors")) == {"classifier.weight", "classifier.bias"}


def test_bundles_contain_no_local_paths(lite: SimpleNamespace, cached: SimpleNamespace) -> None:
    assert_contains_no_local_paths(lite.bundle.path, run=lite)
    assert_contains_no_local_paths(cached.bundle.path, run=cached)


def test_metrics_have_intervals_and_match_the_predictions(lite: SimpleNamespace) -> None:
    metrics = json.loads((lite.folder / "metrics.json").read_text(encoding="utf-8"))
    for measure in MEASURES:
        assert metrics[measure].keys() == {"value", "low", "high"}, measure
        assert metrics[measure]["low"] <= metrics[measure]["value"] <= metrics[measure]["high"], measure
    assert metrics["temperature"] == lite.bundle.manifest["temperature"] > 0
    assert metrics == lite.bundle.manifest["metrics"]
    rows = predictions_of(lite.folder)
    correct = [row["label"] == row["predicted"] for row in rows]
    assert metrics["photos"] == len(rows) == 8
    assert metrics["accuracy"]["value"] == sum(correct) / 8
    losses = [-np.log(float(row[f"p_{row['label']}"])) for row in rows]
    assert metrics["log_loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_predictions_have_a_row_for_each_photo(lite: SimpleNamespace) -> None:
    text = (lite.folder / "predictions.csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "photo,label,predicted,p_cats,p_dogs,ood_score,loss,split,sha256"
    assert text == (lite.bundle.path / "predictions.csv").read_text(encoding="utf-8")
    for row in predictions_of(lite.folder):
        assert row["photo"].startswith(f"valid/{row['label']}/")
        assert row["split"] == "valid"
        assert row["sha256"] == hashlib.sha256((lite.data / row["photo"]).read_bytes()).hexdigest()
        assert float(row["p_cats"]) + float(row["p_dogs"]) == pytest.approx(1)
        assert row["predicted"] == max(("cats", "dogs"), key=lambda name: float(row[f"p_{name}"]))


def test_the_model_card_describes_the_model_and_its_metrics(lite: SimpleNamespace) -> None:
    card = (lite.bundle.path / "README.md").read_text(encoding="utf-8")
    accuracy = lite.bundle.manifest["metrics"]["accuracy"]
    assert card.startswith("# pets\n")
    assert "cats and dogs" in card
    assert "EfficientNet-Lite0" in card
    assert "Apache-2.0" in card
    assert f"| accuracy | {accuracy['value']:.4f} | {accuracy['low']:.4f} to {accuracy['high']:.4f} |" in card
    assert "8 cats, 8 dogs" in card
    assert "head.safetensors" in card


# The settings, on a tiny network that trains quickly


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=9, valid=5)


@pytest.fixture(scope="module")
def cached(colors: Path, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> SimpleNamespace:
    return train(colors, tmp_path_factory.mktemp("cached"), "--backbone", "tiny", "--weights", tiny_weights)


def test_training_on_cached_features_changes_only_the_head(cached: SimpleNamespace, tiny_weights: Path) -> None:
    base = read_tensors(tiny_weights)
    assert changed_tensors(cached.bundle, base) == {"classifier.4.weight", "classifier.4.bias"}
    assert cached.bundle.manifest["last_frozen"] == "classifier.1"
    assert cached.bundle.manifest["base"]["sha256"] == hashlib.sha256(tiny_weights.read_bytes()).hexdigest()


def test_separable_classes_are_learned(cached: SimpleNamespace) -> None:
    assert cached.bundle.manifest["metrics"]["accuracy"]["value"] == 1.0


def test_without_the_feature_cache_the_weights_are_the_same_bit_for_bit(
    cached: SimpleNamespace, tmp_path: Path, tiny_weights: Path
) -> None:
    """Both run the frozen layers in the same engine with a fixed batch size, so not even rounding differs."""
    flags = ("--backbone", "tiny", "--weights", tiny_weights, "--no-feature-cache", "--workers", 3)
    uncached = train(cached.data, tmp_path / "run", *flags)
    assert "No feature cache because --no-feature-cache was given" in uncached.printed
    ours, theirs = weights_of(cached.bundle), weights_of(uncached.bundle)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (uncached.folder / "predictions.csv").read_text() == (cached.folder / "predictions.csv").read_text()


def test_unfrozen_layers_are_trained_and_no_others(cached: SimpleNamespace, tmp_path: Path, tiny_weights: Path) -> None:
    """Augmentation and TensorBoard are on as well: neither changes a frozen tensor."""
    before = tiny_weights.read_bytes()
    flags = ("--backbone", "tiny", "--weights", tiny_weights, "--unfreeze", "features.3", "features.4", "--epochs", 4)
    run = train(cached.data, tmp_path / "run", *flags, "--augment", "--tensorboard")
    assert changed_tensors(run.bundle, read_tensors(tiny_weights)) == {
        "features.3.weight",
        *(f"features.4.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        *(f"classifier.4.{name}" for name in ("weight", "bias")),
    }
    assert "Only `classifier.4`, `features.3` and `features.4` were trained." in (run.bundle.path / "README.md").read_text()
    assert tiny_weights.read_bytes() == before
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert {"loss/train", "loss/valid", "accuracy/train", "accuracy/valid", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/valid")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weights": "none"}, "all weights are trained and nothing is frozen"),
        ({"unfreeze": ("classifier.3",)}, "--unfreeze trains deeper layers"),
        ({"augment": True}, "--augment changes the photos in every epoch"),
        ({"feature_cache": False}, "--no-feature-cache was given"),
    ],
)
def test_the_reason_for_no_feature_cache_is_printed(
    tiny_weights: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], reason: str
) -> None:
    config = Config(**({"backbone": "tiny", "weights": str(tiny_weights)} | settings))
    compute = select_compute("cpu", "fp32")
    assert build_feature_cache(config, prepare_network(TINY, 2, config, compute), compute) is None
    assert f"No feature cache because {reason}. Every epoch runs every photo" in capsys.readouterr().out


def test_random_weights_five_classes_held_out_photos_and_a_damaged_file(tmp_path: Path, tiny_weights: Path) -> None:
    names = ("ambre d'été", "голубой", "緑", "red, or so", "violet")
    data = color_folder(tmp_path / "data", train=10, valid=0, classes=names)
    (data / "train" / "violet" / "broken.jpg").write_bytes(b"no photo")
    flags = ("--backbone", "tiny", "--weights", "none", "--epochs", 10, "--valid-fraction", 0.4)
    run = train(data, tmp_path / "run", *flags)
    assert run.bundle.classes == tuple(sorted(names))
    audit = json.loads((run.folder / "audit.json").read_text(encoding="utf-8"))
    assert list(audit["damaged"]) == ["train/violet/broken.jpg"]
    assert {split: sum(row.values()) for split, row in audit["counts"].items()} == {"train": 30, "valid": 20}
    dataset = run.bundle.manifest["provenance"]["dataset"]
    assert (dataset["excluded"], dataset["photos"], dataset["evaluated_split"]) == (1, audit["counts"], "held-out")
    rows = predictions_of(run.folder)
    assert len(rows) == 20
    assert list(rows[0])[3:8] == [f"p_{name}" for name in sorted(names)]
    metrics = run.bundle.manifest["metrics"]
    assert metrics["accuracy"]["value"] > 0.6  # 0.2 by chance
    assert set(metrics["precision"]) == set(names)
    assert np.array(metrics["confusion_matrix"]).sum() == 20
    engine = OpenVINOEngine(run.bundle.path / "model.onnx", outputs=["probabilities"])
    assert engine.run(run.bundle.golden()[0])[0].shape == (4, 5)
    assert run.bundle.manifest["base"] is None
    assert "trained from random weights" in (run.bundle.path / "README.md").read_text(encoding="utf-8")
    Tiny(5).load_state_dict(weights_of(run.bundle))


# VGG16


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory, photo_folder: PhotoFolder, vgg16_weights: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("vgg")
    data = photo_folder(folder / "pets", train=2, valid=2)
    yield train(data, folder / "run", "--weights", vgg16_weights, "--backbone", "vgg16", "--epochs", 1)
    shutil.rmtree(folder)  # 0.5 GB of weights and a graph of the same size


def test_vgg16_changes_only_its_head_and_loads_into_torchvision(vgg: SimpleNamespace, vgg16_weights: Path) -> None:
    assert changed_tensors(vgg.bundle, read_tensors(vgg16_weights)) == {"classifier.6.weight", "classifier.6.bias"}
    assert vgg.bundle.manifest["last_frozen"] == "classifier.1"
    assert "not the published weights" in vgg.printed
    with torch.device("meta"):
        net: nn.Module = torchvision_models.vgg16(num_classes=2)
    net.load_state_dict(weights_of(vgg.bundle), assign=True)
    net.eval()
    preprocess: Any = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    rows = predictions_of(vgg.folder)[1:3]  # one of each class
    with torch.inference_mode():
        images = torch.stack([preprocess(Image.open(vgg.data / row["photo"]).convert("RGB")) for row in rows])
        probabilities = torch.softmax(net(images) / vgg.bundle.manifest["temperature"], dim=1)
    expected = [[float(row["p_cats"]), float(row["p_dogs"])] for row in rows]
    np.testing.assert_allclose(probabilities.numpy(), expected, atol=1e-3)


def test_the_documented_example_loads_vgg16s_weights_into_plain_torchvision(vgg: SimpleNamespace) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("runs/NAME/bundle", str(vgg.bundle.path)), names)
    assert names["probabilities"].shape == (1, 2)
    assert names["probabilities"].sum().item() == pytest.approx(1.0)
