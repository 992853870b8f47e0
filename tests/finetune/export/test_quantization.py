"""A graph in int8: made and tested on export, served, merged, and left out if it cannot be shown to be accurate enough."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from finetune.export import quantization
from finetune.export.nncf_process import head_nodes, input_nodes, sensitive_nodes
from finetune.export.quantization import NNCFProcess, QuantizationData, add_int8_graph
from models.artifacts.bundle import GOLDEN, GRAPH, INT8_GRAPH, Bundle, check_golden, open_bundle, write_bundle
from models.artifacts.predictions import Predictions
from models.runtime import precision
from models.runtime.openvino_engine import OpenVINOEngine, Pixels
from models.runtime.precision import select_precision
from tests.conftest import SharedFolder
from tests.helpers import tiny_network
from tests.helpers.server import run_service, serve

pytestmark = pytest.mark.slow
SHIPPED = Path(__file__).resolve().parents[3] / "models" / "shipped" / "dogs-vs-cats"


@pytest.fixture(scope="module")
def trained(shared_folder: SharedFolder) -> SimpleNamespace:
    """The network ``tiny`` trained with enough validation photos for int8, and exported with its graphs.

    The processes that the export starts fail if they import torch, which takes more memory than their work.
    """

    def train(folder: Path) -> None:
        data = tiny_network.color_folder(folder / "data", train=20, valid=140)
        (folder / "no" / "torch").mkdir(parents=True)
        (folder / "no" / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
        with tiny_network.registered(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(folder / "no"))
            weights = tiny_network.save_weights(folder / "tiny.pth")
            code, out, message = tiny_network.finetune(
                "train", "--data-dir", data, "--backbone", "tiny", "--weights", weights, "--epochs", 10,
                "--output-dir", folder / "run", "--export", "graph",
            )  # fmt: skip
        assert code == 0, message
        (folder / "output").write_text(out, encoding="utf-8")

    root = shared_folder("int8-bundle", train)
    return SimpleNamespace(
        path=root / "run" / "bundle",
        bundle=open_bundle(root / "run" / "bundle"),
        data=root / "data",
        weights=root / "tiny.pth",
        predictions=Predictions.read_csv(root / "run" / "predictions.csv"),
        output=(root / "output").read_text(encoding="utf-8"),
    )


def as_data(predictions: Predictions, **changes: Any) -> QuantizationData:
    """The evaluated images, whose pixels are never read."""

    def unread() -> Any:
        raise AssertionError("the images were read")

    data = QuantizationData(
        unread,
        unread,
        labels=predictions.labels,
        probabilities=predictions.probabilities,
        ood_scores=predictions.ood_scores,
        groups=None,
        fit_temperature=lambda log_probs: 1.0,
        max_accuracy_loss=0.01,
    )
    return dataclasses.replace(data, **changes)


def test_the_export_measures_int8_on_the_validation_photos(trained: SimpleNamespace) -> None:
    measured = trained.bundle.manifest["int8"]
    assert measured["file"] == INT8_GRAPH
    assert measured["reason"] is None
    assert measured["images"] == 280
    assert measured["changed_labels"] <= 2
    assert 0 < measured["mean_difference"] <= measured["max_difference"] < 0.1
    lost = measured["accuracy_lost"]
    assert lost["value"] <= lost["high"] <= lost["limit"] == 0.01
    assert set(measured["log_loss"]) == set(measured["calibration_error"]) == set(measured["accuracy"]) == {"fp32", "int8"}
    assert measured["accuracy"]["fp32"] == trained.bundle.manifest["metrics"]["accuracy"]["value"]
    assert measured["temperature"] > 0
    assert measured["speedup"] > 0
    line = precision.describe_export(measured)
    assert line.startswith("In int8: ")
    assert line in trained.output
    assert line in (trained.path / "README.md").read_text(encoding="utf-8")


def test_the_graph_is_portable_and_its_head_stays_in_float32(trained: SimpleNamespace) -> None:
    model = onnx.load(trained.path / INT8_GRAPH)
    onnx.checker.check_model(model)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.INT8 in types.values()
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    own = onnx.load(trained.path / GRAPH)
    assert [output.name for output in model.graph.output] == [output.name for output in own.graph.output]
    (head,) = [node for node in model.graph.node if "embedding" in node.input and node.op_type in ("Gemm", "MatMul")]
    assert types[head.input[1]] == onnx.TensorProto.FLOAT


def test_golden_outputs_of_int8_are_its_own(trained: SimpleNamespace) -> None:
    bundle: Bundle = trained.bundle
    engine = OpenVINOEngine(bundle.graph("int8"), outputs=bundle.engine_outputs, precision="int8")
    assert check_golden(bundle, lambda pixels: engine.run(pixels)[0], golden=bundle.golden("int8")) < 1e-3
    assert np.abs(bundle.golden("int8")[1] - bundle.golden()[1]).max() > 0
    scores = bundle.golden_ood_scores("int8")
    assert scores is not None
    np.testing.assert_allclose(engine.run(bundle.golden()[0])[1], scores, rtol=1e-3)


def test_int8_over_http_gives_the_labels_of_float32(trained: SimpleNamespace) -> None:
    photos = sorted((trained.data / "valid").rglob("*.jpg"))[::20]
    labels = {}
    for name in ("fp32", "int8"):
        with serve(trained.path, precision=name) as server:
            responses = [server.post(photo.read_bytes(), path="/predict?abstain=0").json() for photo in photos]
            assert {response["model"]["precision"] for response in responses} == {name}
            labels[name] = [response["predictions"][0]["label"] for response in responses]
            (model,) = server.get("/models").json()["models"]
            assert model["int8"] == trained.bundle.manifest["int8"]
            info = [key for key in server.metrics() if key.startswith("classifier_model_info")]
            assert len(info) == 1
            assert f'precision="{name}"' in info[0]
    assert labels["int8"] == labels["fp32"]
    assert set(labels["int8"]) == {"blue", "red"}


def test_int8_on_request_without_a_graph_fails_at_the_start(tiny_bundle: SimpleNamespace) -> None:
    ended = run_service(bundle=tiny_bundle.path, precision="int8")
    assert ended.returncode != 0
    name = open_bundle(tiny_bundle.path).name
    message = (
        f"PRECISION is int8, but the bundle {name} has no graph in int8 (it was exported with the trained layers only). "
        "Set PRECISION=auto or fp32."
    )
    assert message in [json.loads(line)["message"] for line in ended.stderr.splitlines()]
    with tiny_network.registered():
        code, _, err = tiny_network.finetune("predict", "--bundle", tiny_bundle.path, tiny_bundle.photos, "--precision", "int8")
    assert code == 2
    assert err == f"finetune: {tiny_bundle.path} has no graph in int8. Remove --precision, or use --precision fp32.\n"


def test_wrong_golden_outputs_of_int8_are_rejected(trained: SimpleNamespace, tmp_path: Path) -> None:
    def write_files(folder: Path) -> None:
        shutil.copytree(trained.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        with np.load(folder / GOLDEN) as arrays:
            golden = dict(arrays)
        golden["int8_probabilities"] = golden["int8_probabilities"][:, ::-1]
        np.savez_compressed(folder / GOLDEN, **golden)

    fields = {key: value for key, value in trained.bundle.manifest.items() if key not in ("format", "files", "sha256")}
    wrong = write_bundle(tmp_path / "wrong", fields, write_files=write_files)
    ended = run_service(bundle=wrong.path, precision="int8")
    assert ended.returncode != 0
    assert "does not reproduce its golden outputs" in ended.stderr


def test_too_few_validation_photos_cannot_show_it_and_cost_no_time(trained: SimpleNamespace, tmp_path: Path) -> None:
    few = as_data(trained.predictions, labels=trained.predictions.labels[:100])
    measured = add_int8_graph(tmp_path / GRAPH, few, temperature=1.0)
    assert precision.describe_export(measured) == (
        "int8 not kept: 100 validation photos cannot show that the loss of accuracy is at most 1 point; "
        "at least 268 are needed."
    )
    strict = as_data(trained.predictions, max_accuracy_loss=0.005)
    assert add_int8_graph(tmp_path / GRAPH, strict, temperature=1.0)["reason"] == (
        "280 validation photos cannot show that the loss of accuracy is at most 0.5 points; at least 539 are needed"
    )
    grouped = as_data(trained.predictions, groups=np.arange(280) // 2)
    assert add_int8_graph(tmp_path / GRAPH, grouped, temperature=1.0)["reason"].startswith("140 validation photos cannot show")


def test_a_graph_that_loses_accuracy_is_not_kept(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluated probabilities are those of a better network, so that both attempts seem to lose accuracy."""
    attempts = []

    def quantize(process: NNCFProcess, graph: Path, pixels: Path, out: Path, *, careful: bool) -> None:
        attempts.append(careful)
        shutil.copyfile(trained.path / INT8_GRAPH, out)

    def read_validation() -> Iterator[Pixels]:
        side = trained.bundle.preprocessing.input_px
        yield from np.zeros((70, 4, side, side, 3), np.uint8)

    monkeypatch.setattr(NNCFProcess, "quantize", quantize)
    monkeypatch.setattr(NNCFProcess, "wait", lambda process: None)
    data = as_data(trained.predictions, read_training=lambda: next(read_validation()), read_validation=read_validation)
    shutil.copyfile(trained.path / GRAPH, tmp_path / GRAPH)
    measured = add_int8_graph(tmp_path / GRAPH, data, temperature=1.0)
    assert attempts == [False, True]
    assert measured["file"] is None
    assert measured["layers"] == "all layers but the head, the first convolution and depthwise ones"
    lost = measured["accuracy_lost"]
    assert lost["only_fp32"] > 100
    assert precision.describe_export(measured) == (
        f"int8 not kept: up to {100 * lost['high']:.2f} points of accuracy may be lost, more than 1 point: "
        f"{lost['only_fp32']} of 280 validation photos are classified correctly in float32 only, and "
        f"{lost['only_int8']} in int8 only."
    )
    assert not (tmp_path / INT8_GRAPH).exists()


def depthwise_graph(path: Path, *, side: int = 32) -> None:
    """Write a graph that classifies images by small values next to large ones, between which 8 bits do not distinguish.

    The first convolution adds 0.002 times green to blue. The depthwise one selects every second column, in which blue is 0.
    """

    def tensor(name: str, values: object) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.array(values, np.float32), name)

    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["pixels"], ["float"], to=onnx.TensorProto.FLOAT, name="cast"),
        node("Transpose", ["float"], ["images"], perm=[0, 3, 1, 2], name="transpose"),
        node("Conv", ["images", "first"], ["mixed"], name="conv"),
        node("Relu", ["mixed"], ["positive"], name="relu"),
        node("Conv", ["positive", "scales"], ["selected"], group=2, strides=[1, 2], name="depthwise"),
        node("Conv", ["selected", "equal"], ["last"], name="pointwise"),
        node("ReduceMean", ["last", "axes"], ["embedding"], keepdims=0, name="pool"),
        node("Gemm", ["embedding", "weight", "bias"], ["logits"], transB=1, name="head"),
        node("Softmax", ["logits"], ["probabilities"], axis=1, name="softmax"),
    ]
    constants = [
        tensor("first", np.reshape([0, 0.002, 1] * 2, (2, 3, 1, 1))),
        tensor("scales", np.reshape([10, 10], (2, 1, 1, 1))),
        tensor("equal", np.reshape([1, 0, 0, 1], (2, 2, 1, 1))),
        onnx.numpy_helper.from_array(np.array([2, 3]), "axes"),
        tensor("weight", [[0, -10], [0, 10]]),
        tensor("bias", [25.6, -25.6]),
    ]
    inputs = [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["N", side, side, 3])]
    outputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2]) for name in ("probabilities", "embedding")
    ]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def test_sensitive_layers_stay_in_float32_where_plain_int8_fails(trained: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(280) % 2
    pixels = rng.integers(0, 256, (280, 32, 32, 3)).astype(np.uint8)
    pixels[..., 1] = np.where(labels[:, None, None] == 1, 160, 96)
    pixels[..., 2] = np.where(np.arange(32) % 2 == 1, 255, 0)
    depthwise_graph(tmp_path / GRAPH)
    probabilities = OpenVINOEngine(tmp_path / GRAPH, outputs=["probabilities"]).run(pixels)[0].astype(np.float64)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), labels)
    data = as_data(
        trained.predictions,
        labels=labels,
        probabilities=probabilities,
        ood_scores=None,
        read_training=lambda: pixels[:100],
        read_validation=lambda: iter(pixels.reshape(70, 4, 32, 32, 3)),
    )
    measured = add_int8_graph(tmp_path / GRAPH, data, temperature=1.0)
    assert (measured["file"], measured["reason"]) == (INT8_GRAPH, None)
    assert measured["layers"] == "all layers but the head, the first convolution and depthwise ones"
    assert measured["accuracy"] == {"fp32": 1.0, "int8": 1.0}
    types = {tensor.data_type for tensor in onnx.load(tmp_path / INT8_GRAPH).graph.initializer}
    assert onnx.TensorProto.INT8 in types  # the last convolution


def test_a_graph_that_cannot_be_quantized_does_not_end_the_training(trained: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes(b"not a graph")
    data = as_data(trained.predictions, read_training=lambda: np.zeros((1, 32, 32, 3), np.uint8))
    measured = add_int8_graph(tmp_path / GRAPH, data, temperature=1.0)
    assert measured["file"] is None
    assert measured["reason"].startswith("NNCF could not quantize the graph: ")


@pytest.mark.parametrize(
    ("code", "problem"),
    [("raise SystemExit('no memory')", "no memory"), ("import os; os._exit(3)", "it ended with 3")],
    ids=["with a message", "silently"],
)
def test_a_process_that_ends_is_reported(code: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.setattr(quantization, "NNCF_SCRIPT", script)
    with NNCFProcess() as process:
        process.quantize(tmp_path / GRAPH, tmp_path / "pixels.npy", tmp_path / INT8_GRAPH, careful=False)
        assert process.wait() == f"NNCF could not quantize the graph: {problem}"
    assert not process.folder.exists()


def test_merging_keeps_the_graph_in_int8(trained: SimpleNamespace, tmp_path: Path) -> None:
    with tiny_network.registered():
        code, _, err = tiny_network.finetune("merge", trained.path, tmp_path / "full", "--weights", trained.weights)
    assert code == 0, err
    full = open_bundle(tmp_path / "full")
    assert full.has_int8
    assert full.manifest["files"][INT8_GRAPH] == trained.bundle.manifest["files"][INT8_GRAPH]
    assert select_precision(full, "int8").name == "int8"


def test_the_trained_layers_alone_have_no_int8(tiny_bundle: SimpleNamespace) -> None:
    for path in (tiny_bundle.head, tiny_bundle.path):
        manifest = open_bundle(path).manifest
        assert manifest["int8"] == {"file": None, "reason": "it was exported with the trained layers only"}


def test_quantizing_an_existing_bundle(trained: SimpleNamespace, tmp_path: Path) -> None:
    def write_files(folder: Path) -> None:
        excluded = shutil.ignore_patterns("manifest.json", INT8_GRAPH)
        shutil.copytree(trained.path, folder, dirs_exist_ok=True, ignore=excluded)

    older = {key: value for key, value in trained.bundle.manifest.items() if key not in ("format", "files", "sha256", "int8")}
    older_bundle = write_bundle(tmp_path / "older", older, write_files=write_files)
    code, out, err = tiny_network.finetune("quantize", older_bundle.path, "--data-dir", trained.data)
    assert code == 0, err
    quantized = open_bundle(tmp_path / "older-int8")
    assert quantized.manifest["quantized_from"] == older_bundle.version
    assert out.endswith(f"bundle       {quantized.path} (version {quantized.version})\n")
    unstable = ("speedup", "seconds")
    ours, theirs = (
        {key: value for key, value in bundle.manifest["int8"].items() if key not in unstable}
        for bundle in (quantized, trained.bundle)
    )
    assert set(ours) == set(theirs)
    assert ours["accuracy_lost"] == theirs["accuracy_lost"]
    assert quantized.golden("int8")[1].shape == quantized.golden()[1].shape


def test_a_speed_of_another_processor_is_measured_once(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(*args: Any) -> float:
        calls.append(args)
        return 3.5

    monkeypatch.setattr(precision, "measure_speedup", measure)
    monkeypatch.setattr(precision, "supports_bf16", lambda: False)
    manifest = dict(trained.bundle.manifest)
    manifest["int8"] = manifest["int8"] | {"speedup": 1.0}
    bundle = dataclasses.replace(trained.bundle, manifest=manifest)
    assert select_precision(bundle).name == "fp32"
    assert "int8 is 1.00 times as fast as fp32 on this processor, less than 1.2" in select_precision(bundle).reason
    assert calls == []
    monkeypatch.setattr(precision, "instruction_sets", lambda: ("avx2", "avx_vnni"))
    for _ in range(2):
        selected = select_precision(bundle)
        assert selected.name == "int8"
        assert "3.5 times as fast as fp32" in selected.reason
    assert len(calls) == 1
    assert select_precision(bundle, "fp32").name == "fp32"


def test_the_layers_that_stay_in_float32() -> None:
    model = onnx.load(SHIPPED / GRAPH)
    nodes = {node.name: node for node in model.graph.node}
    sensitive = [nodes[name] for name in sensitive_nodes(model)]
    assert [node.op_type for node in sensitive] == ["Conv"] * 17  # the first, and one of each of the 16 blocks
    assert sensitive[0] is next(node for node in model.graph.node if node.op_type == "Conv")
    groups = [next(a.i for a in node.attribute if a.name == "group") for node in sensitive]
    assert groups[0] == 1
    assert min(groups[1:]) > 1
    head = [nodes[name] for name in head_nodes(model)]
    assert "Conv" not in {node.op_type for node in head}
    assert {"probabilities", "ood_score"} <= {output for node in head for output in node.output}


def test_the_resampling_of_joined_networks_stays_in_float32() -> None:
    def node(kind: str, source: str, target: str) -> onnx.NodeProto:
        return onnx.helper.make_node(kind, [source, "weights"], [target], name=f"{kind}_{target}")

    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("photos", "embedding")]
    nodes = [
        node("MatMul", "photos", "rows"),
        node("MatMul", "rows", "pixels"),
        node("Conv", "pixels", "features"),
        node("MatMul", "features", "embedding"),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "join", value[:1], value[1:]))
    assert input_nodes(model) == ["MatMul_rows", "MatMul_pixels"]
    without_convolution = onnx.helper.make_model(onnx.helper.make_graph(nodes[:1], "mlp", value[:1], value[1:]))
    assert input_nodes(without_convolution) == []
