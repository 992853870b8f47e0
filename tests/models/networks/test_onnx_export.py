"""The exported graph, run with OpenVINO, compared with torch on EfficientNet-Lite0's published weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.artifacts.ood_score import OOD_SCORE, OODParameters
from models.networks.classifier import Classifier, build_classifier
from models.networks.onnx_export import OUTPUTS, export_onnx, export_serving_graph
from models.networks.registry import get_spec
from models.networks.split_point import split_model
from models.networks.weights import load_weights
from models.runtime.openvino_engine import OpenVINOEngine, time_output

pytestmark = pytest.mark.slow

SPEC = get_spec("efficientnet_lite0")
TEMPERATURE = 1.7
BATCH = 4
Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build_classifier(SPEC, num_classes=3, base=load_weights(SPEC).tensors, seed=4)


@pytest.fixture(scope="module")
def graph(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_serving_graph(classifier, SPEC, temperature=TEMPERATURE, path=path)
    return path


@pytest.fixture(scope="module")
def frozen(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> OpenVINOEngine:
    """The frozen module with a fixed batch size, as in training."""
    path = tmp_path_factory.mktemp("graph") / "frozen.onnx"
    frozen_module = split_model(classifier).frozen
    export_onnx(frozen_module, preprocessing=SPEC.preprocessing, outputs=["features"], path=path, batch_size=BATCH)
    return OpenVINOEngine(path, outputs=["features"])


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    """Forty images of noise on different solid colors, which give different outputs."""
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 256, (40, 1, 1, 3))
    return np.clip(flat + rng.normal(0, 40, (40, 224, 224, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
@torch.inference_mode()
def in_torch(classifier: Classifier, pixels: Pixels) -> dict[str, Rows]:
    """The outputs of torch for the first six images."""
    outputs: dict[str, Tensor] = {}
    head, last = classifier.net.get_submodule(SPEC.head), classifier.net.get_submodule(SPEC.cam_layer)
    hooks = (
        head.register_forward_hook(lambda _, args, logits: outputs.update(embedding=args[0], logits=logits)),
        last.register_forward_hook(lambda *a: outputs.update(feature_map=a[2])),
    )
    classifier(torch.from_numpy(pixels[:6]))
    for hook in hooks:
        hook.remove()
    outputs["probabilities"] = torch.softmax(outputs.pop("logits") / TEMPERATURE, dim=1)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def test_graph_matches_torchs_calibrated_probabilities(graph: Path, pixels: Pixels, in_torch: dict[str, Rows]) -> None:
    (probabilities,) = OpenVINOEngine(graph, outputs=["probabilities"]).run(pixels[:6])
    assert probabilities.dtype == np.float32
    assert np.ptp(probabilities, axis=0).max() > 0.01  # the images differ, so the comparison is meaningful
    assert np.abs(probabilities - in_torch["probabilities"]).max() < 1e-4


def test_graph_matches_torchs_embedding_and_feature_map(graph: Path, pixels: Pixels, in_torch: dict[str, Rows]) -> None:
    probabilities, embedding, feature_map = OpenVINOEngine(graph, outputs=OUTPUTS).run(pixels[:6])
    assert np.abs(probabilities - in_torch["probabilities"]).max() < 1e-4
    assert embedding.shape == (6, 1280)
    assert np.allclose(embedding, in_torch["embedding"], atol=1e-3)
    assert feature_map.shape == (6, 1280, 7, 7)
    assert np.allclose(feature_map, in_torch["feature_map"], atol=5e-3)
    assert np.allclose(feature_map.mean(axis=(2, 3)), embedding, atol=1e-4)


def test_graph_computes_the_ood_score_of_its_embedding(classifier: Classifier, pixels: Pixels, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.normal(size=(1280, 64)))[0].T
    parameters = OODParameters(
        center=np.full(1280, 0.02, np.float32),
        directions=np.concatenate([components, rng.normal(0, 0.005, (3, 1280))]).astype(np.float32),
        variances=np.geomspace(1e-2, 1e-4, 64).astype(np.float32),
        other_variance=np.array(1e-4, np.float32),
    )
    path = tmp_path / "model.onnx"
    export_serving_graph(classifier, SPEC, temperature=TEMPERATURE, path=path, ood=parameters)
    embedding, scores, probabilities = OpenVINOEngine(path, outputs=["embedding", OOD_SCORE, "probabilities"]).run(pixels)
    assert scores.shape == (40,)
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(scores, parameters.scores(embedding), rtol=1e-4)
    assert path.stat().st_size < 14_500_000
    assert time_output(path, OOD_SCORE, start="embedding", batch_size=4, rounds=2) > 0
    (alone,) = OpenVINOEngine(path, outputs=["probabilities"]).run(pixels)
    np.testing.assert_allclose(alone, probabilities, atol=1e-5)


def test_results_do_not_depend_on_the_batch_size(graph: Path, pixels: Pixels) -> None:
    engine = OpenVINOEngine(graph, outputs=["probabilities"], threads=1)
    (all_at_once,) = engine.run(pixels)
    assert all_at_once.shape == (40, 3)
    for count in (1, 3):
        assert np.abs(engine.run(pixels[:count])[0] - all_at_once[:count]).max() < 1e-5


def test_result_is_not_overwritten_by_the_next_run(graph: Path, pixels: Pixels) -> None:
    engine = OpenVINOEngine(graph, outputs=["probabilities"])
    (first,) = engine.run(pixels[:1])
    copy = first.copy()
    engine.run(pixels[1:2])
    assert np.array_equal(first, copy)


@pytest.mark.parametrize(("output", "is_computed"), [("probabilities", True), ("embedding", False), ("feature_map", False)])
def test_only_requested_outputs_are_computed(graph: Path, output: str, is_computed: bool) -> None:
    compiled = OpenVINOEngine(graph, outputs=[output]).compiled_model
    steps = {step.get_rt_info()["layerType"].astype(str) for step in compiled.get_runtime_model().get_ops()}
    assert len(compiled.outputs) == 1
    assert ("Softmax" in steps) == is_computed


def test_graph_contains_its_weights_and_no_local_paths(graph: Path) -> None:
    data = graph.read_bytes()
    assert len(data) > 10_000_000  # the weights are inside, not in an external file
    assert [file.name for file in graph.parent.iterdir()] == ["model.onnx"]
    for path in (Path(__file__).resolve().parents[3], Path(torch.__file__).parent, "site-packages"):
        assert str(path).encode() not in data


def test_features_do_not_depend_on_the_position_in_a_fixed_batch(frozen: OpenVINOEngine, pixels: Pixels) -> None:
    ten = pixels[:10]
    (features,) = frozen.run(ten)  # batches of 4, 4 and 2, the last one padded
    assert features.shape == (10, 1280)
    order = np.random.default_rng(1).permutation(10)
    assert np.array_equal(frozen.run(ten[order])[0], features[order])
    for i in (0, 5, 9):
        assert np.array_equal(frozen.run(ten[i : i + 1])[0], features[i : i + 1])


def test_frozen_graph_matches_torchs_features(frozen: OpenVINOEngine, pixels: Pixels, in_torch: dict[str, Rows]) -> None:
    assert np.allclose(frozen.run(pixels[:6])[0], in_torch["embedding"], atol=1e-3)
