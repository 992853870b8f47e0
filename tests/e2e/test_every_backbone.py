"""One network of each family, end to end on drawn images: training, evaluation, a bundle and predictions of the service.

A training compares its ONNX graph with its own probabilities, so this is also the network's test of parity, at its own input
size. The other networks are only exported, at the smallest input size that they support.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.predictions import Predictions
from models.networks.classifier import build_classifier
from models.networks.onnx_export import OUTPUTS, export_serving_graph
from models.networks.registry import get_spec, list_models
from models.networks.split_point import with_outputs
from models.networks.weights import load_weights
from models.runtime.openvino_engine import OpenVINOEngine
from service import create_app
from service.context import services_of
from service.settings import Settings
from tests.conftest import PhotoFolder
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S
from tests.helpers.small_networks import WIDE, made_small, random_state, some_pixels
from tests.helpers.tiny_network import finetune

pytestmark = pytest.mark.heavy
# The smallest network of each family with one builder, such as VGG, ResNet and the widths of MobileNetV1.
FAMILIES = [
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
OTHERS = [name for name in list_models() if name not in FAMILIES]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo_folder: PhotoFolder) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "pets", train=3, valid=2)


@pytest.fixture(scope="module", autouse=True)
def _shared_cache_without_bf16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The measurement of bfloat16 is tested elsewhere, and takes longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("finetune.export.exporter.measure_bf16", lambda *args, **options: None)
        yield


def train(name: str, photos: Path, folder: Path) -> tuple[Bundle, str]:
    """Train for one epoch, from random weights where published ones would be downloaded. Returns the bundle and the output."""
    spec = get_spec(name)
    flags: list[object] = ["--epochs", 1, "--batch-size", 3]
    if spec.weights and not spec.weights.package:
        torch.save(random_state(name), folder / "weights.pth")
        flags += ["--weights", folder / "weights.pth"]
    code, message, err = finetune("train", "--data-dir", photos, "--backbone", name, "--output-dir", folder / "run", *flags)
    assert (code, err) == (0, ""), err
    return open_bundle(folder / "run" / "bundle"), message


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_trained_evaluated_and_served(name: str, photos: Path, tmp_path: Path) -> None:
    with made_small(name, small_images=False) if name in WIDE else contextlib.nullcontext():
        bundle, message = train(name, photos, tmp_path)
    spec = get_spec(name)
    assert bundle.backbone == name
    assert bundle.preprocessing == spec.preprocessing
    frozen = "Features are computed once per photo" if spec.weights else "No feature cache because all weights are trained"
    assert frozen in message

    code, _, err = finetune("evaluate", "--bundle", bundle.path, "--data-dir", photos, "--output-dir", tmp_path / "evaluation")
    assert (code, err) == (0, "")
    trained, evaluated = (json.loads((tmp_path / where / "metrics.json").read_text()) for where in ("run", "evaluation"))
    assert trained["photos"] == evaluated["photos"] == 4
    assert np.isclose(trained["log_loss"]["value"], evaluated["log_loss"]["value"], atol=1e-3)

    table = Predictions.read_csv(tmp_path / "evaluation" / "predictions.csv")
    app = create_app(Settings(bundle=bundle.path, max_batch_size=1, cpus=1, **LONG_TIMEOUTS))
    with contextlib.closing(services_of(app).model_manager) as models:
        models.wait(START_TIMEOUT_S)
        for photo, expected in zip(table.image_names, table.probabilities, strict=True):
            response = app.test_client().post("/predict", data=(photos / photo).read_bytes(), content_type="image/jpeg")
            assert response.status_code == 200, response.text
            document = response.get_json()
            assert document["model"]["version"] == bundle.version
            probabilities = document["predictions"][0]["probabilities"]
            np.testing.assert_allclose([probabilities[label] for label in bundle.classes], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_the_graph_of_another_network_matches_it(name: str, tmp_path: Path) -> None:
    with made_small(name) as spec:
        classifier = build_classifier(spec, num_classes=2, base=random_state(name))
        export_serving_graph(classifier, spec, temperature=1.5, path=tmp_path / "model.onnx")
    pixels = some_pixels(spec, count=3)
    probabilities, embedding, feature_map = OpenVINOEngine(tmp_path / "model.onnx", outputs=OUTPUTS, threads=1).run(
        pixels.numpy()
    )
    with torch.inference_mode():
        log_probs, head_input, last_map = with_outputs(classifier, [(spec.head, True), (spec.cam_layer, False)])(pixels)
    np.testing.assert_allclose(probabilities, torch.softmax(log_probs / 1.5, dim=1), rtol=0, atol=1e-4)
    for found, requested in ((embedding, head_input), (feature_map, last_map)):
        np.testing.assert_allclose(found, requested, rtol=1e-3, atol=1e-3 * float(requested.abs().max()))


def test_lite2_starts_from_its_published_weights(photos: Path) -> None:
    assert load_weights(get_spec("efficientnet_lite2")).published
