"""The engines behind one interface: padding, several at once, torch's answers, and the precision that is chosen."""

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


def test_batches_of_fixed_sizes_give_what_any_size_gives(bundle: Bundle, pixels: Pixels) -> None:
    (wanted,) = engine(bundle).run(pixels)
    fixed = engine(bundle, batch_sizes=(4, 1, 3))
    for count in (1, 2, 3, 4, 5, 11):
        np.testing.assert_allclose(fixed.run(pixels[:count])[0], wanted[:count], atol=1e-6)


def test_threads_that_compute_at_once_get_their_own_answers(bundle: Bundle, pixels: Pixels) -> None:
    (wanted,) = engine(bundle).run(pixels)
    shared = engine(bundle, streams=2, batch_sizes=(1,))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: shared.run(pixels[i : i + 1])[0][0], [i % len(pixels) for i in range(200)]))
    for number, row in enumerate(rows):
        np.testing.assert_allclose(row, wanted[number % len(pixels)], atol=1e-6)


def test_torch_gives_the_graphs_answers(bundle: Bundle, pixels: Pixels) -> None:
    with tiny_network.registered():
        torch_engine = TorchEngine(bundle, device="cpu")
    np.testing.assert_allclose(torch_engine.run(pixels)[0], engine(bundle).run(pixels)[0], atol=1e-4)


def test_importing_openvino_starts_no_other_process_and_leaves_its_converter_to_others() -> None:
    code = (
        "import os, sys; from models.runtime.openvino_engine import load_openvino; load_openvino().Core(); "
        "assert 'openvino_telemetry' not in sys.modules; assert 'openvino.tools.ovc' not in sys.modules; "
        "print(open(f'/proc/self/task/{os.getpid()}/children').read().strip())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[3]
    )
    assert done.stdout.strip() == ""


def test_what_was_compiled_is_kept_and_may_be_damaged(bundle: Bundle, pixels: Pixels, tmp_path: Path) -> None:
    (wanted,) = engine(bundle).run(pixels)
    np.testing.assert_array_equal(engine(bundle, cache_dir=tmp_path).run(pixels)[0], wanted)
    kept = sorted(tmp_path.glob("*.blob"))
    assert len(kept) == 1
    np.testing.assert_array_equal(engine(bundle, cache_dir=tmp_path).run(pixels)[0], wanted)
    assert sorted(tmp_path.glob("*.blob")) == kept
    whole = kept[0].read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no compiled graph at all"):
        kept[0].chmod(0o644)
        kept[0].write_bytes(broken)
        np.testing.assert_array_equal(engine(bundle, cache_dir=tmp_path).run(pixels)[0], wanted)


def with_measured(bundle: Bundle, measured: dict[str, Any] | None) -> Bundle:
    return dataclasses.replace(bundle, manifest={**bundle.manifest, "bf16": measured})


def test_bfloat16_is_chosen_where_the_export_speaks_for_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: True)
    chosen = select_precision(with_measured(bundle, GOOD))
    assert (chosen.name, chosen.tolerance) == ("bf16", BF16_TOLERANCE)
    assert "1.8 times as fast" in chosen.reason
    assert select_precision(with_measured(bundle, GOOD), "fp32").name == "fp32"


@pytest.mark.parametrize(
    "measured",
    [
        None,
        GOOD | {"max_difference": 0.2},
        GOOD | {"changed_labels": 3},
        GOOD | {"speedup": 1.05},
    ],
    ids=["not measured", "too coarse", "other labels", "no faster"],
)
def test_float32_is_kept_where_it_does_not(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, measured: Any) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: True)
    chosen = select_precision(with_measured(bundle, measured))
    assert (chosen.name, chosen.tolerance) == ("fp32", bundle.manifest["golden"]["tolerance"])


def test_a_processor_without_bfloat16(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: False)
    assert select_precision(with_measured(bundle, GOOD)).name == "fp32"
    assert measure_bf16(bundle.path / GRAPH, np.zeros((1, 1, 1, 3), np.uint8)) is None
    with pytest.raises(ConfigError, match="PRECISION is bf16, which this processor does not have"):
        select_precision(bundle, "bf16")


def test_the_export_measures_bfloat16(bundle: Bundle, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bf16", lambda: True)
    measured = measure_bf16(bundle.path / GRAPH, pixels)
    assert measured is not None
    assert measured["images"] == len(pixels)
    assert 0 <= measured["max_difference"] < BF16_TOLERANCE
    assert measured["speedup"] > 0
    assert "bf16" in bundle.manifest
