"""The networks to compare: which ones, their embeddings of a dataset, and their cost."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.compute.device import Compute
from finetune.config import Config
from finetune.data.inspection import ImageRecord
from finetune.features.cache import FeatureCache
from finetune.io.progress import step
from finetune.training.data_loaders import CachedBatches
from finetune.training.setup import TrainingNetwork
from finetune.training.trainer import predict_with_embeddings
from models.errors import ConfigError
from models.networks.batchnorm_fusion import fuse_batchnorm
from models.networks.join import FLIP, SEPARATOR
from models.networks.onnx_export import export_onnx
from models.networks.registry import get_spec, list_models
from models.networks.split_point import with_outputs
from models.networks.weights import has_local_weights
from models.runtime.interleaved_timing import time_interleaved
from models.runtime.openvino_engine import OpenVINOEngine

MAX_JOINED = 3  # networks whose pairs are compared by default
TIMING_ROUNDS, RUNS_PER_ROUND = 20, 5


@dataclass(frozen=True)
class NetworkCost:
    """The median latency of one image in ms (batch size 1, all CPUs, float32, without decoding), and the graph's size in MB."""

    ms_per_image: float
    graph_mb: float


def select_backbones(text: str | None) -> list[str]:
    """Return the networks of a comma-separated list, or the ones to compare by default.

    The default is every network whose pretrained weights are on this machine, each of them with mirror images, and the pairs
    of the first three by name.

    Raises:
        UnknownModelError: A name is unknown.
        ConfigError: There is no network.
    """
    if text is not None:
        names = [get_spec(name).name for name in filter(None, map(str.strip, text.split(",")))]
    else:
        local = [name for name in list_models() if has_local_weights(get_spec(name))]
        pairs = map(SEPARATOR.join, itertools.combinations(local[:MAX_JOINED], 2))
        names = [*local, *(f"{name}{SEPARATOR}{FLIP}" for name in local), *pairs]
    if not names:
        raise ConfigError("--backbones needs the name of a network whose pretrained weights are available.")
    return list(dict.fromkeys(names))


def compute_embeddings(
    network: TrainingNetwork, config: Config, cache: FeatureCache, compute: Compute, records: Sequence[ImageRecord]
) -> NDArray[np.float32]:
    """Return the head's inputs (N, d) for inspected images, from cached features where there are any."""
    features = cache.features(records, network.spec.preprocessing, label=f"features of {network.spec.name}")
    labels = [record.sample.label for record in records]
    batches = CachedBatches(features, labels, batch_size=config.batch_size or 64, seed=config.seed)
    embeddings = predict_with_embeddings(network, batches, compute=compute)[2]
    network.extractor.release()
    return embeddings.reshape(len(embeddings), -1)


def measure_costs(networks: Sequence[TrainingNetwork]) -> dict[str, NetworkCost]:
    """Export each network and measure it in turn with the others. The head is part of it, and takes next to no time."""
    sizes: dict[str, float] = {}
    engines: dict[str, OpenVINOEngine] = {}
    with step("Measuring the latency of the networks"), tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        for number, network in enumerate(networks):
            graph = Path(folder) / f"{number}.onnx"
            module = fuse_batchnorm(with_outputs(network.classifier.eval(), []))
            export_onnx(module, preprocessing=network.spec.preprocessing, outputs=["log_probs"], path=graph, batch_size=1)
            sizes[network.spec.name] = graph.stat().st_size / 1e6
            engines[network.spec.name] = OpenVINOEngine(graph, outputs=["log_probs"])
        calls = {network.spec.name: partial(_run, engines[network.spec.name], network) for network in networks}
        time_interleaved(calls, rounds=1)  # the first round compiles kernels
        durations = time_interleaved(calls, rounds=TIMING_ROUNDS)
    return {
        name: NetworkCost(1000 * float(np.median(times)) / RUNS_PER_ROUND, sizes[name]) for name, times in durations.items()
    }


def _run(engine: OpenVINOEngine, network: TrainingNetwork) -> None:
    preprocessing = network.spec.preprocessing
    shape = (1, preprocessing.input_px, preprocessing.input_px, preprocessing.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for _ in range(RUNS_PER_ROUND):
        engine.run(pixels)
