"""Train several networks on the same data and compare their accuracy, latency and size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import config as settings
from finetune.compare.benchmark import BenchmarkResult, benchmark
from finetune.compare.comparison_report import write_report
from finetune.config import Config
from finetune.data.image_folder import read_dataset
from finetune.data.label_source import locate_data
from finetune.pipeline import resolve_config, train
from finetune.training import run_directory
from models.artifacts.atomic_io import atomic_write_text, sha256_of
from models.artifacts.bundle import Bundle
from models.errors import ConfigError, RunError, WeightsError
from models.networks.registry import get_spec, list_models
from models.networks.spec import ModelSpec
from models.networks.weights import has_local_weights

RECORD_FILE = "compare-run.json"
IGNORED_SETTINGS = run_directory.CHANGEABLE_ON_RESUME - {"epochs", "export"}


SMALL_PX = 64
SMALL, ALL = "small", "all"


@dataclass(frozen=True)
class ComparisonRun:
    """One network of a comparison: its settings and run directory."""

    backbone: str
    config: Config
    folder: Path


def select_networks(text: str) -> list[str]:
    """Return the networks of a comma-separated list of names and groups, without duplicates.

    The group ``small`` contains the networks of this project that are trained from random weights on images of up to 64 px,
    ``all`` those whose pretrained weights are on this machine.

    Raises:
        UnknownModelError: A name is unknown.
        ConfigError: There are fewer than two names.
    """
    names: list[str] = []
    for word in filter(None, map(str.strip, text.split(","))):
        if word == SMALL:
            names += [name for name in list_models() if is_small(get_spec(name))]
        elif word == ALL:
            names += [name for name in list_models() if has_local_weights(get_spec(name))]
        else:
            names.append(get_spec(word).name)
    names = list(dict.fromkeys(names))
    if not names:
        raise ConfigError(f"--backbones takes comma-separated network names, `small` or `all` (got {text!r}).")
    if len(names) < 2:
        raise ConfigError(f"--backbones must name at least two networks (got only {names[0]}).")
    return names


def is_small(spec: ModelSpec) -> bool:
    return spec.weights is None and spec.preprocessing.input_px <= SMALL_PX


def compare_networks(data: Path, backbones: Sequence[str], out: Path, shared: dict[str, Any]) -> list[BenchmarkResult]:
    """Train each network or reuse its run, benchmark all of them and write the report.

    A network is skipped if its weights are unavailable or its training fails.

    Args:
        data: The dataset.
        backbones: Names of the networks.
        out: The folder for the runs and the report.
        shared: Settings for all networks.

    Returns:
        The results, best accuracy first.

    Raises:
        RunError: ``out`` contains a run with other settings or images, or no network could be trained.
        DataError: The dataset cannot be used.
    """
    entries = [_entry(name, data, out, shared) for name in backbones]
    inputs = hash_dataset(entries[0].config)
    for entry in entries:
        _check_same(entry, inputs)
    bundles: dict[str, Bundle] = {}
    skipped: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        print(f"\n[{number} of {len(entries)}] {entry.backbone}", flush=True)
        try:
            bundles[entry.backbone] = _train(entry, inputs)
        except (WeightsError, RunError) as error:
            skipped[entry.backbone] = str(error)
            print(f"Skipped: {error}")
    if not bundles:
        raise RunError(f"None of the networks could be trained. First error: {next(iter(skipped.values()))}")
    seconds = {
        name: _read_record(entry.folder)["seconds"] for name, entry in zip(backbones, entries, strict=True) if name in bundles
    }
    rows = benchmark(bundles, data, seconds=seconds, workers=entries[0].config.workers)
    print("\n" + write_report(out, rows, data=data, skipped=skipped))
    return rows


def hash_dataset(config: Config) -> str:
    """Hash the names, contents, labels and splits of the images, to detect runs on other data."""
    data_dir, labels = locate_data(config.data_dir, config.labels)
    dataset = read_dataset(data_dir, labels=labels, valid_fraction=config.valid_fraction, seed=config.seed)
    rows = [
        [sample.name, sample.split, sample.label, sha256_of(sample.path) if sample.path.is_file() else ""]
        for sample in dataset.samples
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _entry(name: str, data: Path, out: Path, shared: dict[str, Any]) -> ComparisonRun:
    folder = out / name.replace(":", "-").replace("/", "-")
    config = settings.from_mapping({**shared, "data_dir": data, "backbone": name, "output_dir": folder})
    return ComparisonRun(name, resolve_config(config, get_spec(name)), folder)


def _train(entry: ComparisonRun, inputs: str) -> Bundle:
    """Train, resume or reuse a run, record its training time and return its bundle."""
    record = _read_record(entry.folder)
    if record and (entry.folder / run_directory.BUNDLE).is_dir():
        print(f"Reusing the finished run in {entry.folder}.")
    resume = (entry.folder / run_directory.CONFIG).is_file()
    started = time.perf_counter()
    was_finished = (entry.folder / run_directory.BUNDLE).is_dir()
    try:
        return train(entry.config, resume=resume)
    finally:
        if (entry.folder / run_directory.CONFIG).is_file() and not (was_finished and record):
            seconds = record.get("seconds", 0.0) + time.perf_counter() - started
            atomic_write_text(entry.folder / RECORD_FILE, json.dumps({"photos": inputs, "seconds": seconds}) + "\n")


def _check_same(entry: ComparisonRun, inputs: str) -> None:
    """Raise RunError if an existing run was started with other settings or images."""
    if not (entry.folder / run_directory.CONFIG).is_file():
        run_directory.require_no_run(entry.folder)
        return
    saved = settings.from_mapping(run_directory.read_config(entry.folder))
    for f in dataclasses.fields(Config):
        before, now = getattr(saved, f.name), getattr(entry.config, f.name)
        if f.name not in IGNORED_SETTINGS and before != now:
            flag = f"--{f.name.replace('_', '-')}"
            raise RunError(
                f"The run in {entry.folder} was trained with {flag} {before}, not {now}. Choose another --output-dir."
            )
    if _read_record(entry.folder).get("photos", inputs) != inputs:
        raise RunError(f"The run in {entry.folder} was trained on other photos. Choose another --output-dir.")


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
