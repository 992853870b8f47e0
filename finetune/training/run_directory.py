"""A run's folder: its settings, its checkpoint and its history, so that a killed run goes on where it was."""

from __future__ import annotations

import csv
import dataclasses
import io
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.config import Config, from_mapping, read_yaml
from finetune.training.trainer import Progress
from models.artifacts.atomic_io import atomic_write, atomic_write_text
from models.errors import RunError

CONFIG, CHECKPOINT, HISTORY, BUNDLE = "config.yaml", "checkpoint.pt", "history.csv", "bundle"
REVIEWS = "reviews.csv"
# What a person may change when going on: none of these has a part in the weights.
CHANGEABLE_ON_RESUME = {
    "workers",
    "tensorboard",
    "name",
    "export",
    "cache_dir",
    "cache_limit_mb",
    "feature_cache",
    "data_dir",
    "reviews",  # what it holds is named among a run's inputs
    "output_dir",
    "epochs",
}


def require_no_run(folder: Path) -> None:
    """Raise RunError where another run, or anything else, is in a new run's place."""
    if (folder / CONFIG).is_file():
        raise RunError(f"{folder} holds another run; name another with --output-dir (RUN= with make), or go on with --resume.")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and is no run; name another folder with --output-dir (RUN= with make).")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, and a run needs a folder; name another with --output-dir (RUN= with make).")


def create_run(folder: Path, config: Config, *, reviews: bytes | None = None) -> None:
    """Make a new run's folder and keep its settings there, and the reviews as they arrived."""
    atomic_write_text(folder / CONFIG, yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
    if reviews is not None:
        with atomic_write(folder / REVIEWS) as part:
            part.write_bytes(reviews)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings that a run was started with. Raises RunError where there is none."""
    if not (folder / CONFIG).is_file():
        raise RunError(f"There is no run in {folder} to go on with; start it without --resume.")
    return read_yaml(folder / CONFIG)


def require_same_settings(folder: Path, config: Config) -> None:
    """Raise RunError where ``config`` would not give the run's own weights."""
    kept = from_mapping(read_config(folder))
    for f in dataclasses.fields(Config):
        before, now = getattr(kept, f.name), getattr(config, f.name)
        if before != now and (f.name not in CHANGEABLE_ON_RESUME or (f.name == "epochs" and config.lr_schedule == "cosine")):
            flag = f"--{f.name.replace('_', '-')}"
            raise RunError(
                f"The run in {folder} was started with {flag} {before}, not {now}; leave {flag} out, or start another run."
            )


def remove_partial_files(folder: Path) -> None:
    """Remove the half-written files that a killed run leaves beside their targets."""
    for part in list(folder.rglob(".*.part")):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def save_checkpoint(folder: Path, progress: Progress, *, inputs: str) -> None:
    """Write the checkpoint whole or not at all, and the history beside it. ``inputs`` names what it was trained on."""
    with atomic_write(folder / CHECKPOINT) as part, part.open("wb") as file:
        try:
            torch.save({"inputs": inputs, **vars(progress)}, file)
        except RuntimeError as error:  # torch wraps what the file said, such as that the disk is full
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    write_history(folder / HISTORY, progress.history)


def load_checkpoint(folder: Path, *, inputs: str) -> Progress | None:
    """The progress of a run that was interrupted, or None before its first epoch. Raises RunError for other ``inputs``."""
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        before = state.pop("inputs")
        progress = Progress(**state)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise RunError(f"The checkpoint {file} is damaged ({type(error).__name__}); delete {folder} and start again.") from None
    if before != inputs:
        raise RunError(f"The photos or weights are not those that the run in {folder} was started with; start another run.")
    return progress


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """One row an epoch: epoch, losses and accuracies, learning rate, seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write_text(path, text.getvalue())
