"""Every row of the zoo's table, end to end on drawn pictures: train, evaluate, a bundle, and the engine that serves it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PhotoFolder
from tiny import finetune
from zoo_helpers import WIDE, made_small, random_state

from models.bundle import Bundle, check_golden, open_bundle
from models.engine import OnnxEngine
from models.registry import get_spec
from models.weights import find_weights

pytestmark = pytest.mark.heavy
# One network for each row; of a family with one builder (VGG, ResNet, the widths of MobileNetV1) the smallest. A training
# checks its ONNX graph against its own probabilities, so each row is also that network's ONNX parity, at its own size.
ROWS = [
    "mlp",
    "cnn_mnist",
    "lenet5",
    "lenet_cifar",
    "cnn_two_conv",
    "cnn_selu",
    "cnn_separable",
    "alexnet_2012",
    "alexnet",
    "vgg_cifar",
    "vgg11",
    "googlenet",
    "inception_v3",
    "inception_v4",
    "resnet18",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "squeezenet1_1",
    "efficientnet_lite2",
    "timm:mobilenetv3_small_050",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo_folder: PhotoFolder) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "pets", train=3, valid=2)


@pytest.fixture(scope="module", autouse=True)
def _one_cache_and_no_plots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plots are tested elsewhere, and take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("finetune.results.write_plots", lambda *a, **k: None)
        yield


def train(name: str, photos: Path, folder: Path) -> tuple[Bundle, str]:
    """One epoch, from random numbers in the weights' place where there are weights to be had (the Lites' are here)."""
    spec = get_spec(name)
    flags: list[object] = ["--epochs", 1, "--batch-size", 3]
    if spec.weights and not spec.weights.package:
        torch.save(random_state(name), folder / "weights.pth")
        flags += ["--weights", folder / "weights.pth"]
    code, said, err = finetune(
        "train", "--data-dir", photos, "--backbone", name, "--output-dir", folder / "run", "--name", "row", *flags
    )
    assert (code, err) == (0, ""), err
    return open_bundle(folder / "run" / "bundle"), said


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table_is_trained_evaluated_and_served(name: str, photos: Path, tmp_path: Path) -> None:
    with made_small(name, small_pictures=False) if name in WIDE else contextlib.nullcontext():
        bundle, said = train(name, photos, tmp_path)
    spec = get_spec(name)
    assert bundle.backbone == name
    assert bundle.preprocessing == spec.preprocessing
    frozen = "The frozen part ends behind" if spec.weights else "No feature cache, as all weights are trained"
    assert frozen in said

    engine = OnnxEngine(bundle.path / "model.onnx", outputs=["probabilities", "embedding", "feature_map"], threads=1)
    check_golden(bundle, lambda pixels: engine.run(pixels)[0])
    data = sorted((photos / "valid").rglob("*.jpg"))[0].read_bytes()
    probabilities, embedding, feature_map = engine.run(np.stack([bundle.preprocessing.pixels(data)]))
    assert probabilities.shape == (1, 2)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert (embedding.ndim, feature_map.ndim) == (2, 4)

    code, _, err = finetune("evaluate", "--bundle", bundle.path, "--data-dir", photos, "--output-dir", tmp_path / "evaluation")
    assert (code, err) == (0, "")
    trained, evaluated = (json.loads((tmp_path / where / "metrics.json").read_text()) for where in ("run", "evaluation"))
    assert trained["photos"] == evaluated["photos"] == 4
    assert np.isclose(trained["log_loss"]["value"], evaluated["log_loss"]["value"], atol=1e-3)


def test_lite2_starts_from_its_published_weights(photos: Path) -> None:
    assert find_weights(get_spec("efficientnet_lite2")).published
