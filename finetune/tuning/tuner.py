"""Tune a dataset: inspect the training images, compute their embeddings by each network, search and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import config as settings
from finetune.compute.device import select_compute
from finetune.data.image_folder import read_dataset
from finetune.data.label_source import locate_data
from finetune.export.provenance import dataset_sha256
from finetune.io.progress import step
from finetune.io.threaded_map import available_cpus
from finetune.training.setup import (
    PreparedDataset,
    TrainingNetwork,
    build_feature_cache,
    prepare_dataset,
    prepare_network,
)
from finetune.tuning.networks import compute_embeddings, measure_costs, select_backbones
from finetune.tuning.search import search
from finetune.tuning.tuning_report import describe_search, write_tuning_report
from models.networks.registry import get_spec
from models.networks.spec import LOGISTIC, PLAIN, STANDARD, UNIT

NORMALIZATIONS = (UNIT, STANDARD, PLAIN)


def tune(data_dir: Path, backbones: str | None, out: Path, shared: dict[str, Any]) -> str:
    """Compare heads on the training images of a dataset. The validation images have no part in it.

    Args:
        data_dir: The dataset.
        backbones: Comma-separated networks; None selects them.
        out: The folder for the results.
        shared: Settings of the dataset and of the machine.

    Returns:
        The report as Markdown.
    """
    names = select_backbones(backbones)
    configs = [settings.from_mapping({**shared, "data_dir": data_dir, "backbone": name, "head": LOGISTIC}) for name in names]
    config = configs[0]
    compute = select_compute(config.device, config.precision)
    folder, labels = locate_data(config.data_dir, config.labels)
    dataset = read_dataset(folder, labels=labels, valid_fraction=config.valid_fraction, seed=config.seed)
    networks: list[TrainingNetwork] = []
    embeddings: dict[str, NDArray[np.float32]] = {}
    prepared: PreparedDataset | None = None
    for number, own in enumerate(configs, start=1):
        print(f"\nNetwork {number} of {len(names)}: {own.backbone}")
        spec = get_spec(own.backbone)
        network = prepare_network(spec, len(dataset.classes), own.with_recipe(spec.recipe), compute)
        cache = build_feature_cache(own, network, compute)
        assert cache is not None, "a configuration without a feature cache"
        prepared = prepared or prepare_dataset(own, dataset, network, cache)
        embeddings[spec.name] = compute_embeddings(network, own, cache, compute, prepared.splits["train"])
        networks.append(network)
    print()
    assert prepared is not None, "select_backbones returns at least one"
    records = prepared.splits["train"]
    heads = len(names) * len(NORMALIZATIONS)
    with step(f"Cross-validating {heads} candidates with each penalty on {len(records):,} training photos"):
        result = search(
            embeddings,
            np.array(prepared.labels("train"), dtype=np.int64),
            prepared.groups("train"),
            num_classes=len(dataset.classes),
            normalizations=NORMALIZATIONS,
            seed=config.seed,
            workers=config.workers or available_cpus(),
        )
    description = describe_search(result, measure_costs(networks), seed=config.seed)
    description = {"data": {"name": data_dir.resolve().name, "sha256": dataset_sha256(records)}, **description}
    return write_tuning_report(out, description, data=data_dir)
