"""The inference engines: batch padding, concurrency, the compilation cache, and the selection of the precision."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.artifacts.bundle import GRAPH, Bundle, open_bundle
from models.errors import ConfigError
from models.runtime import precision
from models.runtime.openvino_engine import OpenVINOEngine, Pixels
from models.runtime.precision import BF16_TOLERANCE, measure_bf16, select_precision
from models.runtime.torch_engine import TorchEngine
from tests.helpers import tiny_network

GOOD = {"images": 64, "max_difference": 0.01, "changed_labels": 0, "speedup": 1.8}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: SimpleNamespace) -> Bundle:
    return open_bundle(tiny_bundle.path)


@pytest.fixture(scope="module")
def pixels(bundle: Bundle) -> Pixels:
    side = bundle.preprocessing.input_px
    return np.random.default_rng(0).integers(0, 256, (11, side, side, 3), dtype=np.uint8)


def engine(bundle: Bundle, **settings: Any) -> OpenVINOEngine:
    return OpenVINOEngine(bundle.path / GRAPH, outputs=["probabilities"], **settings)


def test_fixed_batch_sizes_match_dynamic_batches(bundle: Bundle, pixels: Pixels) -> None:
    (expected,) = engine(bundle).run(pixels)
    fixed = engine(bundle, batch_sizes=(4, 1, 3))
    for count in (1, 2, 3, 4, 5, 11):
        np.testing.assert_allclose(fixed.run(pixels[:count])[0], expected[:count], atol=1e-6)


def test_concurrent_calls_return_their_own_results(bundle: Bundle, pixels: Pixels) -> None:
    (expected,) = engine(bundle).run(pixels)
    shared = engine(bundle, streams=2, batch_sizes=(1,))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: shared.run(pixels[i : i + 1])[0][0], [i % len(pixels) for i in range(200)]))
    for number, row in enumerate(rows):
        np.testing.assert_allclose(row, expected[number % len(pixels)], atol=1e-6)


def test_torch_engine_matches_the_graph(bundle: Bundle, pixels: Pixels) -> None:
    with tiny_network.registered():
        torch_engine = TorchEngine(bundle, device="cpu")
    probabilities, scores = torch_engine.run(pixels)
    expected = OpenVINOEngine(bundle.path / GRAPH, outputs=bundle.engine_outputs).run(pixels)
    np.testing.assert_allclose(probabilities, expected[0], atol=1e-4)
    np.testing.assert_allclose(scores, expected[1], rtol=1e-4)


def test_torch_engine_of_a_bundle_without_ood_score(bundle: Bundle, pixels: Pixels) -> None:
    older = dataclasses.replace(bundle, manifest={**bundle.manifest, "ood": None})
    with tiny_network.registered():
        (probabilities,) = TorchEngine(older, device="cpu").run(pixels)
    np.testing.assert_allclose(probabilities, engine(bundle).run(pixels)[0], atol=1e-4)


def test_importing_openvino_starts_no_process_and_does_not_block_its_converter() -> None:
    code = (
        "import os, sys; from models.runtime.openvino_engine import load_openvino; load_openvino().Core(); "
        "assert 'openvino_telemetry' not in sys.modules; assert 'openvino.tools.ovc' not in sys.modules; "
        "print(open(f'/proc/self/task/{os.getpid()}/children').read().strip())"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[3]
    )
    assert completed.stdout.strip() == ""


def test_compiled_graph_is_cached_and_a_damaged_cache_is_ignored(bundle: Bundle, pixels: Pixels, tmp_path: Path) -> None:
    (expected,) = engine(bundle).run(pixels)
    np.testing.assert_array_equal(engine(bundle, cache_dir=tmp_path).run(pixels)[0], expected)
    cached = sorted(tmp_path.glob("*.blob"))
    assert len(cached) == 1
    np.testing.assert_array_equal(engine(bundle, cache_dir=tmp_path).run(pixels)[0], expected)
    assert sorted(tmp_path.glob("*.blob")) == cached
    content = cached[0].read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not a compiled graph"):
        cached[0].chmod(0o644)
        cached[0].write_bytes(broken)
        np.testing.assert_array_equal(engine(bundle, cache_dir=tmp_path).run(pixels)[0], expected)


def with_measured(bundle: Bundle, measured: dict[str, Any] | None) -> Bundle:
    return dataclasses.replace(bundle, manifest={**bundle.manifest, "bf16": measured})


def test_bfloat16_is_selected_if_the_measurement_is_acceptable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: True)
    selected = select_precision(with_measured(bundle, GOOD))
    assert (selected.name, selected.tolerance) == ("bf16", BF16_TOLERANCE)
    assert "1.8 times as fast" in selected.reason
    assert select_precision(with_measured(bundle, GOOD), "fp32").name == "fp32"


@pytest.mark.parametrize(
    "measured",
    [
        None,
        GOOD | {"max_difference": 0.2},
        GOOD | {"changed_labels": 3},
        GOOD | {"speedup": 1.05},
    ],
    ids=["not measured", "too inaccurate", "changed labels", "not faster"],
)
def test_float32_is_selected_otherwise(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, measured: Any) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: True)
    selected = select_precision(with_measured(bundle, measured))
    assert (selected.name, selected.tolerance) == ("fp32", bundle.manifest["golden"]["tolerance"])


def test_processor_without_bfloat16(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: False)
    assert select_precision(with_measured(bundle, GOOD)).name == "fp32"
    assert measure_bf16(bundle.path / GRAPH, np.zeros((1, 1, 1, 3), np.uint8)) is None
    with pytest.raises(ConfigError, match="PRECISION is bf16, but this processor does not support it"):
        select_precision(bundle, "bf16")


def test_bfloat16_measurement(bundle: Bundle, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: True)
    measured = measure_bf16(bundle.path / GRAPH, pixels)
    assert measured is not None
    assert measured["images"] == len(pixels)
    assert 0 <= measured["max_difference"] < BF16_TOLERANCE
    assert measured["speedup"] > 0
    assert "bf16" in bundle.manifest
