"""Benchmark trained networks on the same images through their serving graphs, with interleaved timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.batch_inference.predict import classify
from finetune.metrics.groups import compute_metrics_of_groups
from models.artifacts.bundle import PREDICTIONS, Bundle
from models.artifacts.predictions import Predictions
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
    """One network's results. The intervals are 95% intervals.

    ``epochs`` is 0 for a logistic head. ``correct`` (N,) is true for correctly classified images. ``groups`` (N,) numbers
    their groups, if there are any.
    """

    backbone: str
    pretrained: bool
    precision: str
    accuracy: Interval
    balanced_accuracy: Interval
    macro_f1: Interval
    log_loss: Interval
    ms_per_image: float
    graph_mb: float
    parameters: int
    training_s: float
    epochs: int
    correct: NDArray[np.bool_]
    groups: NDArray[np.int64] | None = None


def benchmark(
    bundles: Mapping[str, Bundle], data: Path, *, seconds: Mapping[str, float], workers: int = 0
) -> list[BenchmarkResult]:
    """Benchmark the bundles on the validation images that all of them share.

    Each runs in the precision that the service would select. Runs with a held-out split move near duplicates of training images
    back to training, so validation images can differ slightly between runs.

    Args:
        bundles: The bundles by network name.
        data: The dataset that all were trained on.
        seconds: Training time of each network in seconds.
        workers: Number of decoding threads. 0: one per CPU.

    Returns:
        The results, best accuracy first.
    """
    evaluated = {name: Predictions.read_csv(bundle.path / PREDICTIONS) for name, bundle in bundles.items()}
    first = next(iter(evaluated.values()))
    shared = set.intersection(*(set(table.image_names) for table in evaluated.values()))
    selected = [i for i, name in enumerate(first.image_names) if name in shared]
    labels = first.labels[selected]
    groups = None if first.group_numbers is None else first.group_numbers[selected]
    paths = [data / first.image_names[i] for i in selected]
    precisions = {name: select_precision(bundle).name for name, bundle in bundles.items()}
    times = measure_latency(bundles, paths[:IMAGES_PER_ROUND], precisions)
    rows = []
    for name, bundle in bundles.items():
        predictions = classify(bundle, paths, precision=precisions[name], workers=workers)
        probabilities = np.stack([p.probabilities for p in predictions if p.probabilities is not None]).astype(np.float64)
        metrics = compute_metrics_of_groups(labels, probabilities, classes=bundle.classes, groups=groups)
        rows.append(
            BenchmarkResult(
                backbone=name,
                pretrained=bundle.manifest["base"] is not None,
                precision=precisions[name],
                **{name: metrics[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")},
                ms_per_image=times[name],
                graph_mb=bundle.graph(precisions[name]).stat().st_size / 1e6,
                parameters=bundle_parameters(bundle),
                training_s=seconds[name],
                epochs=0 if bundle.manifest["provenance"].get("penalty") else int(bundle.manifest["provenance"]["epochs"]),
                correct=np.asarray(probabilities.argmax(axis=1) == labels),
                groups=groups,
            )
        )
    return sorted(rows, key=lambda row: (-row.accuracy["value"], row.log_loss["value"]))


def measure_latency(bundles: Mapping[str, Bundle], paths: Sequence[Path], precisions: Mapping[str, str]) -> dict[str, float]:
    """Measure the median latency per image in ms (batch size 1, all CPUs, without decoding) over 20 interleaved rounds."""
    engines = {
        name: OpenVINOEngine(bundle.graph(precisions[name]), outputs=["probabilities"], precision=precisions[name])
        for name, bundle in bundles.items()
    }
    pixels = {
        name: [np.stack([bundle.preprocessing.pixels(path.read_bytes())]) for path in paths] for name, bundle in bundles.items()
    }

    def run_all(name: str) -> None:
        for image in pixels[name]:
            engines[name].run(image)

    calls = {name: partial(run_all, name) for name in bundles}
    time_interleaved(calls, rounds=1)  # the first round compiles kernels
    durations = time_interleaved(calls, rounds=ROUNDS)
    return {name: 1000 * float(np.median(values)) / len(paths) for name, values in durations.items()}


def bundle_parameters(bundle: Bundle) -> int:
    """Count the network's parameters with the bundle's number of classes."""
    spec = get_spec(bundle.backbone)
    net = build_on_meta(spec)
    replace_heads(net, spec.heads, len(bundle.classes))
    return count_parameters(net)
