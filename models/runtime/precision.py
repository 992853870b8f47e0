"""Select float32, bfloat16 or int8 for inference, based on the accuracy and speed that were measured on export.

The speed of a lower precision depends on the processor. If the bundle was exported on a processor with other instruction sets,
the speed is measured once on this one, and cached.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.artifacts.atomic_io import atomic_write_text, locked_folder
from models.artifacts.bundle import Bundle, check_file
from models.artifacts.ood_score import OOD_SCORE
from models.artifacts.paths import speed_dir
from models.errors import ConfigError
from models.runtime.interleaved_timing import time_interleaved
from models.runtime.openvino_engine import OpenVINOEngine, Pixels, supports_bf16
from models.runtime.processor import INT8, instruction_sets

# Max difference of a probability. bfloat16 has 8 significant bits; over 50 layers 0.05 was measured on 400 images.
BF16_TOLERANCE = 0.1
MAX_CHANGED_LABELS = 0.02  # fraction of images whose predicted label may change (close calls)
MIN_SPEEDUP = 1.2  # relative to float32
TIMED_IMAGES, TIMED_ROUNDS = 16, 5
NAMES = {"bf16": "bfloat16", "int8": "int8"}


@dataclass(frozen=True)
class Precision:
    """A selected numeric precision.

    Attributes:
        name: "fp32", "bf16" or "int8".
        tolerance: Max allowed difference of a probability from the golden outputs.
        reason: Why it was selected.
    """

    name: str
    tolerance: float
    reason: str


def measure_bf16(graph: Path, pixels: Pixels, *, max_ood_score: float | None = None) -> dict[str, Any] | None:
    """Compare bfloat16 with float32 on real images.

    Args:
        graph: The ONNX file.
        pixels: (N, H, W, C) uint8.
        max_ood_score: The limit of the OOD score, if the graph has one. An image that changes sides counts as a changed label.

    Returns:
        The number of images, the max difference of a probability, the number of changed labels, the speedup and the
        processor's instruction sets; or None if the processor does not support bfloat16, because an emulation's speed is
        meaningless.
    """
    if not supports_bf16():
        return None
    outputs = ["probabilities"] if max_ood_score is None else ["probabilities", OOD_SCORE]
    engines = {name: OpenVINOEngine(graph, outputs=outputs, precision=name, batch_sizes=(4,)) for name in ("fp32", "bf16")}
    results = {name: engine.run(pixels) for name, engine in engines.items()}
    probabilities = {name: arrays[0] for name, arrays in results.items()}
    changed = probabilities["bf16"].argmax(axis=1) != probabilities["fp32"].argmax(axis=1)
    if max_ood_score is not None:
        changed |= (results["bf16"][1] > max_ood_score) != (results["fp32"][1] > max_ood_score)
    return {
        "images": len(pixels),
        "max_difference": float(np.abs(probabilities["bf16"] - probabilities["fp32"]).max()),
        "changed_labels": int(changed.sum()),
        "speedup": _time(engines["fp32"], engines["bf16"], pixels),
        "instruction_sets": list(instruction_sets()),
    }


def measure_speedup(graph: Path, other: Path, precision: str, pixels: Pixels) -> float:
    """Measure how many times as fast as float32 another precision is, in turn.

    Args:
        graph: The ONNX file in float32.
        other: The ONNX file to run in ``precision``.
        precision: "bf16" or "int8".
        pixels: (N, H, W, C) uint8.
    """
    fp32, lower = (
        OpenVINOEngine(file, outputs=["probabilities"], precision=name, batch_sizes=(4,))
        for file, name in ((graph, "fp32"), (other, precision))
    )
    for engine in (fp32, lower):
        engine.run(pixels[:TIMED_IMAGES])  # the first run compiles kernels
    return _time(fp32, lower, pixels)


def _time(fp32: OpenVINOEngine, other: OpenVINOEngine, pixels: Pixels) -> float:
    calls = {name: partial(engine.run, pixels[:TIMED_IMAGES]) for name, engine in (("fp32", fp32), ("other", other))}
    seconds = time_interleaved(calls, rounds=TIMED_ROUNDS)
    return round(min(seconds["fp32"]) / min(seconds["other"]), 2)


def select_precision(bundle: Bundle, requested: str = "auto") -> Precision:
    """Select the precision to run a bundle in.

    Args:
        bundle: The bundle.
        requested: "fp32", "bf16", "int8", or "auto" for the fastest one that the export's measurement and this processor allow.

    Raises:
        ConfigError: bf16 is requested, but the processor does not support it; or int8, but the bundle has no graph in int8.
    """
    fp32 = partial(Precision, "fp32", float(bundle.manifest["golden"]["tolerance"]))
    if requested == "fp32":
        return fp32("it was requested")
    if requested != "auto":
        _require_available(bundle, requested)
        return Precision(requested, _tolerance(bundle, requested), "it was requested")
    problems, speedups = [], {}
    for name in NAMES:
        if problem := _problem(bundle, name):
            problems.append(problem)
        elif (speedup := _speedup_here(bundle, name)) < MIN_SPEEDUP:
            problems.append(f"{NAMES[name]} is {speedup:.2f} times as fast as fp32 on this processor, less than {MIN_SPEEDUP}")
        else:
            speedups[name] = speedup
    if not speedups:
        return fp32("; ".join(problems))
    name = max(speedups, key=lambda name: speedups[name])
    describe = {"bf16": describe_bf16, "int8": describe_int8}[name]
    return Precision(name, _tolerance(bundle, name), describe({**bundle.manifest[name], "speedup": speedups[name]}))


def _require_available(bundle: Bundle, requested: str) -> None:
    if requested == "bf16" and not supports_bf16():
        raise ConfigError("PRECISION is bf16, but this processor does not support it. Set PRECISION=auto or fp32.")
    if requested == "int8" and not bundle.has_int8:
        raise ConfigError(f"PRECISION is int8, but {_missing_int8(bundle)}. Set PRECISION=auto or fp32.")


def _tolerance(bundle: Bundle, name: str) -> float:
    return BF16_TOLERANCE if name == "bf16" else float(bundle.manifest["int8"]["tolerance"])


def _problem(bundle: Bundle, name: str) -> str | None:
    """Return why the accuracy that was measured or this processor excludes a precision, or None."""
    if name == "int8":
        return None if bundle.has_int8 else _missing_int8(bundle)
    measured = bundle.manifest.get("bf16")
    if not supports_bf16():
        return "this processor does not support bfloat16"
    if measured is None:
        return "bfloat16 was not measured when the bundle was exported"
    return None if is_bf16_acceptable(measured) else "bfloat16 was too inaccurate or not faster when the bundle was exported"


def _missing_int8(bundle: Bundle) -> str:
    measured = bundle.manifest.get("int8")
    return f"the bundle {bundle.name} has no graph in int8" + (f" ({measured['reason']})" if measured else "")


def _speedup_here(bundle: Bundle, name: str) -> float:
    """Return the speedup of the export, or measure it on this processor if the export's had other instruction sets."""
    measured = bundle.manifest[name]
    own = instruction_sets()
    if tuple(measured.get("instruction_sets", own)) == own:
        return float(measured["speedup"])
    folder = speed_dir()
    if folder is None:
        return _measure_here(bundle, name)
    file = folder / f"{bundle.version}-{name}-{'-'.join(own)}.json"
    with locked_folder(folder):  # one of several workers measures
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(file.read_text(encoding="utf-8"))["speedup"])
        speedup = _measure_here(bundle, name)
        with contextlib.suppress(OSError):
            atomic_write_text(file, json.dumps({"speedup": speedup}) + "\n")
    return speedup


def _measure_here(bundle: Bundle, name: str) -> float:
    for precision in ("fp32", name):
        check_file(bundle.path, bundle.graph(precision).name, bundle.manifest["files"])
    return measure_speedup(bundle.graph("fp32"), bundle.graph(name), name, bundle.golden()[0])


def describe_bf16(measured: Mapping[str, Any]) -> str:
    """Summarize a measurement in one line."""
    return (
        f"{measured['speedup']:.1f} times as fast as fp32 on {measured['images']} images, max probability difference"
        f" {measured['max_difference']:.3f}, changed labels: {measured['changed_labels']}"
    )


def is_bf16_acceptable(measured: Mapping[str, Any]) -> bool:
    """Return whether a measurement is within the limits for bfloat16."""
    return bool(
        measured["max_difference"] <= BF16_TOLERANCE
        and measured["changed_labels"] <= MAX_CHANGED_LABELS * measured["images"]
        and measured["speedup"] >= MIN_SPEEDUP
    )


def describe_export(measured: Mapping[str, Any]) -> str:
    """Describe in one sentence what the export found about int8."""
    return f"In int8: {describe_int8(measured)}." if measured["file"] else f"int8 not kept: {measured['reason']}."


def describe_int8(measured: Mapping[str, Any]) -> str:
    """Summarize a measurement of int8 in one line."""
    where = "" if INT8 & set(measured["instruction_sets"]) else ", on a processor without instructions for int8"
    accuracy = measured["accuracy"]
    return (
        f"{measured['speedup']:.1f} times as fast as fp32{where}; accuracy {100 * accuracy['int8']:.2f}% instead of"
        f" {100 * accuracy['fp32']:.2f}% on {measured['images']:,} images, at most"
        f" {100 * measured['accuracy_lost']['high']:.2f} points lost with 95% confidence; changed labels:"
        f" {measured['changed_labels']}"
    )
