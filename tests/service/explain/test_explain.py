"""Heat maps: exact for linear heads, by occlusion for others, computed one at a time and cached."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from models.artifacts.bundle import GRAPH, WEIGHTS, Bundle, open_bundle
from models.runtime.openvino_engine import OpenVINOEngine
from service.explain.cam import LinearHead
from service.explain.explainer import CAM, OCCLUSION, OUTPUTS, Explainer
from service.explain.heatmap import apply_colormap, legend, overlay
from service.explain.occlusion import FORWARD_PASSES, GRID_SIZE, occlusion_map
from service.http.errors import Problem
from service.images.worker_pool import PoolFullError
from tests.helpers.server import poll

pytestmark = pytest.mark.slow

SIDE = 32
TIMEOUT_S = 300.0  # its thread has a low priority, and the machine may be busy
TEMPERATURE = 0.7
CLASSES = ("red", "green", "blue")


def graph(path: Path, *, weight: np.ndarray, bias: np.ndarray, relu: bool, bent: bool, normalizes: bool = False) -> None:
    """A network whose last map is each channel's mean over 4 x 4 px; ``relu`` follows it, or what is not linear (``bent``).

    ``normalizes``: The embedding is scaled to unit length before the last layer.
    """
    constants = {"scale": np.float32(1 / 255), "half": np.float32(0.5 if relu else 0.0), "w": weight.T.copy(), "b": bias}
    constants["t"] = np.float32(TEMPERATURE)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Sub", ["means", "half"], ["feature_map"]),
        helper.make_node("Relu" if relu else "Identity", ["feature_map"], ["active"]),
        helper.make_node("GlobalMaxPool" if bent else "GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node("LpNormalization", ["embedding"], ["unit"], axis=1, p=2),
        helper.make_node("MatMul", ["unit" if normalizes else "embedding", "w"], ["scores"]),
        helper.make_node("Add", ["scores", "b"], ["shifted"]),
        helper.make_node("Div", ["shifted", "t"], ["calibrated"]),
        helper.make_node("Softmax", ["calibrated"], ["probabilities"], axis=1),
    ]
    shapes = {"probabilities": ["N", 3], "embedding": ["N", 3], "feature_map": ["N", 3, 8, 8]}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "drawn",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Bundle]:
    """Return ``make(relu=, bent=)``, which creates a bundle of that network with what explanations need."""

    def made(
        *,
        relu: bool = False,
        bent: bool = False,
        in_bundle: np.ndarray | None = None,
        gain: float = 20.0,
        normalizes: bool = False,
    ) -> Bundle:
        weight = (gain * np.eye(3)).astype(np.float32)
        bias = np.array([0.1, -0.2, 0.3], np.float32)
        graph(tmp_path / GRAPH, weight=weight, bias=bias, relu=relu, bent=bent, normalizes=normalizes)
        save_file({"fc.weight": weight if in_bundle is None else in_bundle, "fc.bias": bias}, tmp_path / WEIGHTS)
        preprocessing = {"input_px": SIDE, "resize_px": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3}
        manifest = {"head": "fc", "temperature": TEMPERATURE, "classes": list(CLASSES), "preprocessing": preprocessing}
        manifest |= {"sha256": "0" * 64, "files": {WEIGHTS: {}}, "normalizes_embedding": normalizes}
        return Bundle(tmp_path, MappingProxyType(manifest))

    return made


def drawn() -> np.ndarray:
    """A gray image with a red square at the upper left and a smaller green one at the lower right."""
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pixels[4:12, 8:16] = (255, 0, 0)
    pixels[24:28, 20:24] = (0, 255, 0)
    return pixels


def explain(bundle: Bundle, label: str, pixels: np.ndarray | None = None) -> Any:
    explainer = Explainer(bundle, timeout_s=TIMEOUT_S)
    try:
        return explainer.explain("a" * 64, label, lambda: drawn() if pixels is None else pixels)
    finally:
        explainer.close()


def place(heat: np.ndarray) -> tuple[int, int]:
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    return int(y), int(x)


# The class-activation map


@pytest.mark.parametrize("change", [{}, {"relu": True}, {"normalizes": True}])
def test_the_map_sums_to_the_scores_and_gives_the_probabilities(make: Callable[..., Bundle], change: dict[str, bool]) -> None:
    bundle = make(**change)
    found = [explain(bundle, label) for label in CLASSES]
    assert {each.method for each in found} == {CAM}
    head = LinearHead.from_bundle(bundle)
    assert head is not None
    scores = np.array([each.evidence.mean() for each in found]) + head.bias
    expected = OpenVINOEngine(bundle.path / GRAPH, outputs=["probabilities"]).run(drawn()[None])[0][0]
    given = np.exp(scores / TEMPERATURE) / np.exp(scores / TEMPERATURE).sum()
    assert given == pytest.approx(expected, abs=1e-5)
    assert abs(scores.sum()) < 1e-4


def test_the_map_is_high_on_evidence_for_the_class(make: Callable[..., Bundle]) -> None:
    bundle = make()
    y, x = place(explain(bundle, "red").heatmap(SIDE))
    assert (4 <= y < 12, 8 <= x < 16) == (True, True)
    y, x = place(explain(bundle, "green").heatmap(SIDE))
    assert (24 <= y < 28, 20 <= x < 24) == (True, True)
    assert "Exact for this network" in explain(bundle, "red").description


def test_the_heatmap_is_between_0_and_1_and_weak_evidence_stays_weak(make: Callable[..., Bundle]) -> None:
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pixels[:16] = (255, 0, 0)
    pixels[24:] = (128, 140, 128)  # a breath of green
    bundle = make()
    strong, weak = explain(bundle, "red", pixels).heatmap(SIDE), explain(bundle, "green", pixels).heatmap(SIDE)
    assert (strong.shape, strong.dtype) == ((SIDE, SIDE), np.float32)
    assert strong.min() == 0
    assert strong.max() == pytest.approx(1)
    assert 0 < weak.max() < 0.2


def test_no_evidence_for_a_class_is_reported(make: Callable[..., Bundle]) -> None:
    pixels = np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8)
    found = explain(make(gain=2.0), "blue", pixels)
    assert found.is_empty
    assert found.heatmap(SIDE).max() == 0
    assert found.description == "No region supports 'blue' over the other classes (class-activation map)."


@pytest.mark.parametrize("wrong", ["weights", "no weights", "max pooling", "shuffled"])
def test_exactness_is_verified_numerically(make: Callable[..., Bundle], wrong: str) -> None:
    bundle = make(bent=wrong == "max pooling", in_bundle=np.eye(3, dtype=np.float32) if wrong == "weights" else None)
    if wrong == "no weights":
        (bundle.path / WEIGHTS).unlink()
    if wrong == "shuffled":
        bundle = replace(bundle, manifest={**bundle.manifest, "permute_pixels": 0})
    found = explain(bundle, "red")
    assert (found.method, found.forward_passes) == (OCCLUSION, FORWARD_PASSES)
    assert "when they are blurred" in found.description


def test_a_convolutional_head_is_linear_too(make: Callable[..., Bundle]) -> None:
    bundle = make()
    save_file(
        {"fc.weight": (20 * np.eye(3, dtype=np.float32)).reshape(3, 3, 1, 1), "fc.bias": np.float32([0.1, -0.2, 0.3])},
        bundle.path / WEIGHTS,
    )
    assert explain(bundle, "red").method == CAM


# Occlusion


def test_occlusion_finds_the_drawn_object(make: Callable[..., Bundle]) -> None:
    """The network uses the largest value of each channel, so only covering the whole square changes its output."""
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pixels[12:20, 12:20] = (255, 0, 0)
    found = explain(make(bent=True, gain=4.0), "red", pixels)
    assert found.method == OCCLUSION
    assert found.evidence.shape == (GRID_SIZE, GRID_SIZE)
    heat = found.heatmap(SIDE)
    assert heat[12:20, 12:20].min() > 2 * max(heat[:8].max(), heat[24:].max(), heat[:, :8].max(), heat[:, 24:].max())


def test_occlusion_runs_the_stated_number_of_images_and_covers_every_pixel() -> None:
    requested: list[np.ndarray] = []

    def run(pixels: np.ndarray) -> np.ndarray:
        requested.append(pixels[0])
        return np.array([[0.5, 0.5]], np.float32)

    pixels = np.zeros((28, 28, 1), np.uint8)
    assert (occlusion_map(run, pixels, 0, fill=np.full_like(pixels, 200)) == 0).all()
    assert len(requested) == FORWARD_PASSES
    assert (np.max(requested, axis=0) == 200).all()
    assert pixels.max() == 0


def test_occlusion_works_for_a_certain_prediction() -> None:
    """Probabilities near 1 differ only in those of the other classes."""

    def run(pixels: np.ndarray) -> np.ndarray:
        other = 1e-6 if (pixels[0, :8, :8] == 0).all() else 1e-5
        return np.array([[1 - other, other]], np.float32)

    found = occlusion_map(run, np.zeros((32, 32, 3), np.uint8), 0, fill=np.full((32, 32, 3), 9, np.uint8))
    assert place(found) == (0, 0)


def test_a_bundle_with_a_deep_head_is_explained_by_occlusion(tiny_bundle: SimpleNamespace) -> None:
    bundle = open_bundle(tiny_bundle.path)
    pixels = bundle.preprocessing.pixels(next(iter(sorted((tiny_bundle.photos / "red").iterdir()))).read_bytes())
    found = explain(bundle, "red", pixels)
    assert found.method == OCCLUSION
    assert np.isfinite(found.evidence).all()


# One at a time, and kept


def test_explanations_are_cached_by_photo_and_class(make: Callable[..., Bundle]) -> None:
    explainer, requested = Explainer(make(), timeout_s=TIMEOUT_S), []

    def pixels() -> np.ndarray:
        requested.append(1)
        return drawn()

    for sha256, label in (("a", "red"), ("a", "red"), ("a", "green"), ("b", "red"), ("a", "red")):
        assert explainer.explain(sha256, label, pixels).label == label
    assert len(requested) == 3
    explainer.close()


def test_concurrent_explanations_are_computed_one_by_one_or_rejected(make: Callable[..., Bundle]) -> None:
    explainer, inside, most, may_end = Explainer(make(), timeout_s=TIMEOUT_S, max_queued=2), [], [], threading.Event()

    def pixels() -> np.ndarray:
        inside.append(1)
        most.append(len(inside))
        may_end.wait(300)
        inside.pop()
        return drawn()

    def ask(number: int) -> str:
        try:
            return str(explainer.explain(str(number), "red", pixels).method)
        except PoolFullError:
            return "full"

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, 0)
        poll(lambda: inside)
        others = [pool.submit(ask, number) for number in range(1, 8)]
        poll(lambda: sum(other.done() for other in others) == 5)
        may_end.set()
        answers = [first.result(300), *(other.result(300) for other in others)]
    assert sorted(answers) == [CAM] * 3 + ["full"] * 5
    assert max(most) == 1
    explainer.close()


def test_an_unknown_class_is_rejected_by_name(make: Callable[..., Bundle]) -> None:
    with pytest.raises(Problem, match="red, green, blue") as caught:
        explain(make(), "zebra")
    assert caught.value.code == "bad_parameter"


def test_the_idle_engine_is_released_and_created_again(make: Callable[..., Bundle]) -> None:
    explainer = Explainer(make(), timeout_s=TIMEOUT_S, idle_timeout_s=0.05)
    assert explainer._engine is None
    for sha256 in "ab":
        assert explainer.explain(sha256, "red", drawn).method == CAM
        poll(lambda: explainer._engine is None)
    explainer.close()


def test_outputs_match_the_exported_ones() -> None:
    from models.networks import onnx_export as graph

    assert graph.OUTPUTS == OUTPUTS


# The picture


def test_the_overlay_is_the_gray_photo_with_the_heatmap_in_color() -> None:
    pixels = np.full((SIDE, SIDE, 3), 200, np.uint8)
    heat = np.zeros((SIDE, SIDE), np.float32)
    heat[8:16, 8:16] = 1
    seen = np.asarray(Image.open(io.BytesIO(overlay(pixels, heat)))).astype(int)
    assert seen.shape == (SIDE, SIDE, 3)
    hot, cold = seen[12, 12], seen[30, 30]
    assert hot[0] > hot[2] + 80  # yellow
    assert cold[2] > cold[1]  # violet
    assert Image.open(io.BytesIO(overlay(pixels[..., :1], heat))).size == (SIDE, SIDE)


def test_colors_increase_evenly_in_lightness() -> None:
    """Steps of lightness are equal within a half, so that colors can be distinguished without their hue."""
    rgb = apply_colormap(np.linspace(0, 1, 9, dtype=np.float32)) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ np.array([0.2126, 0.7152, 0.0722])) - 16
    steps = np.diff(lightness)
    assert steps.min() > 0.5 * steps.mean()
    assert steps.max() < 1.5 * steps.mean()


def test_colors_match_viridis() -> None:
    from matplotlib import colormaps

    numbers = np.arange(256, dtype=np.float32) / 255
    assert np.abs(apply_colormap(numbers) - 255 * colormaps["viridis"](numbers)[:, :3]).max() <= 3


def test_the_legend_runs_from_low_to_high() -> None:
    bar = np.asarray(Image.open(io.BytesIO(legend(width_px=64, height_px=4))))
    assert bar.shape == (4, 64, 3)
    assert np.abs(bar[0, 0] - np.array([68, 1, 84])).max() <= 1
    assert np.abs(bar[0, -1] - np.array([253, 231, 37])).max() <= 1
