"""bfloat16 in place of float32: only where it was measured to agree and to be faster, and never without saying so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.artifacts.bundle import Bundle
from models.errors import ConfigError
from models.runtime.interleaved_timing import time_interleaved
from models.runtime.openvino_engine import OpenVINOEngine, Pixels, supports_bf16

BF16_TOLERANCE = 0.1  # of a probability: 8 significant bits through 50 layers; 0.05 was seen on 400 photos of cats and dogs
MAX_CHANGED_LABELS = 0.02  # the share of photos that may get another label: those that are near to even
MIN_SPEEDUP = 1.2  # times as fast as float32
TIMED_IMAGES, TIMED_ROUNDS = 16, 3


@dataclass(frozen=True)
class Precision:
    """How exactly an engine computes, and by how much a probability may differ from the evaluated one for it."""

    name: str
    tolerance: float
    reason: str


def measure_bf16(graph: Path, pixels: Pixels) -> dict[str, Any] | None:
    """Run real photos' ``pixels`` (N, H, W, C) in float32 and in bfloat16: how much they differ, and the gain in speed.

    Gives None where this processor has no bfloat16: emulated, it says nothing of the speed.
    """
    if not supports_bf16():
        return None
    engines = {
        name: OpenVINOEngine(graph, outputs=["probabilities"], precision=name, batch_sizes=(4,)) for name in ("fp32", "bf16")
    }
    answers = {name: engine.run(pixels)[0] for name, engine in engines.items()}
    calls = {name: partial(engine.run, pixels[:TIMED_IMAGES]) for name, engine in engines.items()}
    seconds = time_interleaved(calls, rounds=TIMED_ROUNDS)
    return {
        "images": len(pixels),
        "max_difference": float(np.abs(answers["bf16"] - answers["fp32"]).max()),
        "changed_labels": int((answers["bf16"].argmax(axis=1) != answers["fp32"].argmax(axis=1)).sum()),
        "speedup": round(min(seconds["fp32"]) / min(seconds["bf16"]), 2),
    }


def select_precision(bundle: Bundle, requested: str = "auto") -> Precision:
    """The precision to serve a bundle in: ``requested``, or for ``auto`` what its export measured and this processor has.

    Raises ConfigError where bf16 is demanded of a processor that has none.
    """
    measured = bundle.manifest.get("bf16")
    exact = float(bundle.manifest["golden"]["tolerance"])
    if requested == "fp32":
        return Precision("fp32", exact, "it was asked for")
    if not supports_bf16():
        if requested == "bf16":
            raise ConfigError("PRECISION is bf16, which this processor does not have; set PRECISION=auto or fp32.")
        return Precision("fp32", exact, "this processor has no bfloat16")
    if requested == "bf16":
        return Precision("bf16", BF16_TOLERANCE, "it was asked for")
    if measured is None:
        return Precision("fp32", exact, "the bundle was exported without a measurement of bfloat16")
    if not is_bf16_acceptable(measured):
        return Precision("fp32", exact, "bfloat16 was measured when the bundle was exported, and was too coarse or no faster")
    return Precision(
        "bf16",
        BF16_TOLERANCE,
        describe_bf16(measured),
    )


def describe_bf16(measured: Mapping[str, Any]) -> str:
    """A measurement in words."""
    return (
        f"on {measured['images']} photos it was {measured['speedup']:.1f} times as fast as fp32, a probability differed"
        f" by {measured['max_difference']:.3f} at most, and {measured['changed_labels']} got another label"
    )


def is_bf16_acceptable(measured: Mapping[str, Any]) -> bool:
    """Whether a measurement speaks for bfloat16."""
    return bool(
        measured["max_difference"] <= BF16_TOLERANCE
        and measured["changed_labels"] <= MAX_CHANGED_LABELS * measured["images"]
        and measured["speedup"] >= MIN_SPEEDUP
    )
