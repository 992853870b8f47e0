"""The run directory: settings, checkpoint and history, from which an interrupted run is resumed."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.compute import distributed
from finetune.config import Config, from_mapping, read_yaml
from finetune.training.trainer import Progress
from models.artifacts.atomic_io import atomic_write, atomic_write_text
from models.errors import RunError

if sys.platform != "win32":
    import fcntl

CONFIG, CHECKPOINT, HISTORY, BUNDLE = "config.yaml", "checkpoint.pt", "history.csv", "bundle"
REVIEWS = "reviews.csv"
# Settings that may change on resume because they do not affect the weights
CHANGEABLE_ON_RESUME = {
    "workers",
    "tensorboard",
    "name",
    "export",
    "cache_dir",
    "cache_limit_mb",
    "feature_cache",
    "data_dir",
    "labels",  # its content is part of the inputs' hash
    "reviews",  # its content is part of the inputs' hash
    "output_dir",
    "epochs",
    "false_alarms",
    "int8",
    "max_accuracy_loss",
}


def require_no_run(folder: Path) -> None:
    """Raise RunError unless ``folder`` is missing or empty."""
    if (folder / CONFIG).is_file():
        raise RunError(f"{folder} already contains a run. Choose another --output-dir (make: RUN=), or continue with --resume.")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and does not contain a run. Choose another --output-dir (make: RUN=).")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, but a run needs a folder. Choose another --output-dir (make: RUN=).")


def create_run(folder: Path, config: Config, *, reviews: bytes | None = None) -> None:
    """Create a run directory with its settings and a copy of the reviews file.

    Raises:
        RunError: Another process has created the run since ``require_no_run``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CONFIG}.{os.getpid()}.part"
    text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
        os.link(temporary, folder / CONFIG)  # atomic, and unlike a rename it fails if the file exists
    except FileExistsError:
        require_no_run(folder)
    except PermissionError:
        if not temporary.exists():
            raise
        temporary.replace(folder / CONFIG)  # a file system without hard links
    finally:
        temporary.unlink(missing_ok=True)
    if reviews is not None:
        with atomic_write(folder / REVIEWS) as temporary:
            temporary.write_bytes(reviews)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``. A killed process leaves no lock.

    Raises:
        RunError: Another process is training in it.
    """
    with (folder / CONFIG).open("r+b") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"Another process is training in {folder}. Wait until it ends, or choose another --output-dir."
                ) from None
        yield


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings that a run was started with. Raises RunError if there is no run."""
    if not (folder / CONFIG).is_file():
        raise RunError(f"No run to resume in {folder}. Start it without --resume.")
    return read_yaml(folder / CONFIG)


def resumed_config(explicit: Mapping[str, Any]) -> Config:
    """Build the settings of a run to resume: the saved ones, overridden by the explicit ones.

    Args:
        explicit: The explicit settings by name, including ``output_dir``. None means the saved value.

    Raises:
        RunError: There is no run in ``output_dir``.
        ConfigError: A setting is unknown or has an invalid value.
    """
    passed = {name: value for name, value in explicit.items() if value is not None}
    saved = distributed.run_on_main(lambda: read_config(Path(passed["output_dir"]).expanduser()))
    return from_mapping({**saved, **passed})


def require_same_settings(folder: Path, config: Config) -> None:
    """Raise RunError if ``config`` would lead to other weights than the settings of the run."""
    values = read_config(folder)
    saved = from_mapping(values)
    for f in dataclasses.fields(Config):
        if f.name not in values:
            continue  # the run was started by a version without this setting
        before, now = getattr(saved, f.name), getattr(config, f.name)
        if before != now and (f.name not in CHANGEABLE_ON_RESUME or (f.name == "epochs" and config.lr_schedule == "cosine")):
            flag = f"--{f.name.replace('_', '-')}"
            raise RunError(
                f"The run in {folder} was started with {flag} {before}, not {now}. Remove {flag}, or start another run."
            )


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of a killed run."""
    for path in list(folder.rglob(".*.part")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_checkpoint(folder: Path, progress: Progress, *, inputs: str) -> None:
    """Write the checkpoint atomically, and the history. ``inputs`` is the hash of the data and base weights."""
    with atomic_write(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"inputs": inputs, **vars(progress)}, file)
        except RuntimeError as error:  # torch wraps OSErrors such as a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    write_history(folder / HISTORY, progress.history)


def load_checkpoint(folder: Path, *, inputs: str) -> Progress | None:
    """Load the progress of an interrupted run, or None before its first epoch.

    Raises:
        RunError: The checkpoint is damaged, or the run was started with other ``inputs``.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved_inputs = state.pop("inputs")
        progress = Progress(**state)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise RunError(f"The checkpoint {file} is damaged ({type(error).__name__}). Delete {folder} and start again.") from None
    if saved_inputs != inputs:
        raise RunError(f"The run in {folder} was started with other photos or weights. Start another run.")
    return progress


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write one row per epoch: epoch, losses, accuracies, learning rate and seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write_text(path, text.getvalue())


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a history file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
