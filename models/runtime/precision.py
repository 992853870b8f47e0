"""Select bfloat16 or float32 for inference, based on the accuracy and speed that were measured on export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.artifacts.bundle import Bundle
from models.artifacts.ood import OOD_SCORE
from models.errors import ConfigError
from models.runtime.interleaved_timing import time_interleaved
from models.runtime.openvino_engine import OpenVINOEngine, Pixels, supports_bf16

# Max difference of a probability. bfloat16 has 8 significant bits; over 50 layers 0.05 was measured on 400 images.
BF16_TOLERANCE = 0.1
MAX_CHANGED_LABELS = 0.02  # fraction of images whose predicted label may change (close calls)
MIN_SPEEDUP = 1.2  # relative to float32
TIMED_IMAGES, TIMED_ROUNDS = 16, 3


@dataclass(frozen=True)
class Precision:
    """A selected numeric precision.

    Attributes:
        name: "fp32" or "bf16".
        tolerance: Max allowed difference of a probability from the evaluated one.
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
        The number of images, the max difference of a probability, the number of changed labels and the speedup; or None if
        the processor does not support bfloat16, because an emulation's speed is meaningless.
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
    calls = {name: partial(engine.run, pixels[:TIMED_IMAGES]) for name, engine in engines.items()}
    seconds = time_interleaved(calls, rounds=TIMED_ROUNDS)
    return {
        "images": len(pixels),
        "max_difference": float(np.abs(probabilities["bf16"] - probabilities["fp32"]).max()),
        "changed_labels": int(changed.sum()),
        "speedup": round(min(seconds["fp32"]) / min(seconds["bf16"]), 2),
    }


def select_precision(bundle: Bundle, requested: str = "auto") -> Precision:
    """Select the precision to run a bundle in.

    Args:
        bundle: The bundle.
        requested: "fp32", "bf16", or "auto" to use bfloat16 if the export's measurement and this processor allow it.

    Raises:
        ConfigError: bf16 is requested, but the processor does not support it.
    """
    measured = bundle.manifest.get("bf16")
    fp32_tolerance = float(bundle.manifest["golden"]["tolerance"])
    if requested == "fp32":
        return Precision("fp32", fp32_tolerance, "it was requested")
    if not supports_bf16():
        if requested == "bf16":
            raise ConfigError("PRECISION is bf16, but this processor does not support it. Set PRECISION=auto or fp32.")
        return Precision("fp32", fp32_tolerance, "this processor does not support bfloat16")
    if requested == "bf16":
        return Precision("bf16", BF16_TOLERANCE, "it was requested")
    if measured is None:
        return Precision("fp32", fp32_tolerance, "bfloat16 was not measured when the bundle was exported")
    if not is_bf16_acceptable(measured):
        reason = "bfloat16 was too inaccurate or not faster when the bundle was exported"
        return Precision("fp32", fp32_tolerance, reason)
    return Precision("bf16", BF16_TOLERANCE, describe_bf16(measured))


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
