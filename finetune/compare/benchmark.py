"""Trained networks measured alike: through the graphs that are served, on the same photos, one after another in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.batch_inference.predict import classify
from finetune.metrics.bootstrap import bootstrap_mean_interval
from models.artifacts.bundle import GRAPH, PREDICTIONS, Bundle
from models.artifacts.predictions import Predictions, cross_entropy
from models.artifacts.statistics import wilson_interval
from models.networks.flops import build_on_meta, count_parameters
from models.networks.head_replacement import replace_heads
from models.networks.registry import get_spec
from models.runtime.interleaved_timing import time_interleaved
from models.runtime.openvino_engine import OpenVINOEngine
from models.runtime.precision import select_precision

ROUNDS, IMAGES_PER_ROUND = 20, 5
Interval = dict[str, float]


@dataclass(frozen=True)
class BenchmarkResult:
    """One network's figures. ``correct`` (N,) says which photos it has right; ``accuracy`` and ``log_loss`` have 95 % ends."""

    backbone: str
    pretrained: bool
    precision: str
    accuracy: Interval
    log_loss: Interval
    ms_per_image: float
    graph_mb: float
    parameters: int
    training_s: float
    epochs: int
    correct: NDArray[np.bool_]


def benchmark(
    bundles: Mapping[str, Bundle], data: Path, *, seconds: Mapping[str, float], workers: int = 0
) -> list[BenchmarkResult]:
    """Measure the bundles on the validation photos that all of them know, the best first.

    Each in the precision that the service would choose. A run moves a held-out photo that looks like a training one back, so
    that the photos of two runs can differ by some; those that not all have are left out.
    """
    known = {name: Predictions.read_csv(bundle.path / PREDICTIONS) for name, bundle in bundles.items()}
    first = next(iter(known.values()))
    shared = set.intersection(*(set(table.image_names) for table in known.values()))
    chosen = [i for i, photo in enumerate(first.image_names) if photo in shared]
    labels = first.labels[chosen]
    paths = [data / first.image_names[i] for i in chosen]
    precisions = {name: select_precision(bundle).name for name, bundle in bundles.items()}
    times = measure_latency(bundles, paths[:IMAGES_PER_ROUND], precisions)
    rows = []
    for name, bundle in bundles.items():
        answers = classify(bundle, paths, precision=precisions[name], workers=workers)
        probabilities = np.stack([a.probabilities for a in answers if a.probabilities is not None]).astype(np.float64)
        correct = np.asarray(probabilities.argmax(axis=1) == labels)
        rows.append(
            BenchmarkResult(
                backbone=name,
                pretrained=bundle.manifest["base"] is not None,
                precision=precisions[name],
                accuracy=wilson_interval(int(correct.sum()), len(labels)),
                log_loss=bootstrap_mean_interval(cross_entropy(labels, probabilities), seed=0, resamples=1000),
                ms_per_image=times[name],
                graph_mb=(bundle.path / GRAPH).stat().st_size / 1e6,
                parameters=bundle_parameters(bundle),
                training_s=seconds[name],
                epochs=int(bundle.manifest["provenance"]["epochs"]),
                correct=correct,
            )
        )
    return sorted(rows, key=lambda row: (-row.accuracy["value"], row.log_loss["value"]))


def measure_latency(bundles: Mapping[str, Bundle], paths: Sequence[Path], precisions: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds for one photo, batch 1, all processors, decoding left out: the median of 20 rounds."""
    engines = {
        name: OpenVINOEngine(bundle.path / GRAPH, outputs=["probabilities"], precision=precisions[name])
        for name, bundle in bundles.items()
    }
    pixels = {
        name: [np.stack([bundle.preprocessing.pixels(path.read_bytes())]) for path in paths] for name, bundle in bundles.items()
    }

    def run_all(name: str) -> None:
        for photo in pixels[name]:
            engines[name].run(photo)

    calls = {name: partial(run_all, name) for name in bundles}
    time_interleaved(calls, rounds=1)  # the first round compiles kernels
    took = time_interleaved(calls, rounds=ROUNDS)
    return {name: 1000 * float(np.median(values)) / len(paths) for name, values in took.items()}


def bundle_parameters(bundle: Bundle) -> int:
    """What the network has to learn with the bundle's own number of classes."""
    spec = get_spec(bundle.backbone)
    net = build_on_meta(spec)
    replace_heads(net, spec.heads, len(bundle.classes))
    return count_parameters(net)
