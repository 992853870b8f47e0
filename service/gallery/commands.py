"""The shell commands that the pages suggest: retrain a model with the reviews, and serve the result."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.paths import resolve_bundle
from models.errors import UserError
from service.context import gallery, services
from service.web.layout import current_model

TRAIN_FLAGS = ("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "lr_schedule", "seed")
HEAD_FLAGS = ("head", "normalization", "penalty")
RUNS = Path("runs")


def find_bundle(version: str) -> Bundle | None:
    """Return the bundle of a model, or None if it is not on this machine."""
    active = current_model().bundle
    if version == active.version:
        return active
    if path := gallery().bundle_path(version):
        with contextlib.suppress(UserError):
            return open_bundle(resolve_bundle(path), files=())
    return None


def retrain_command(bundle: Bundle, *, has_extra_data: bool) -> str:
    """Return the command that trains a model again with its own settings, so that only the reviews make a difference.

    Args:
        bundle: The bundle of the model.
        has_extra_data: Whether to add the labeled production photos, unpacked as the folder ``production``.
    """
    config = bundle.manifest.get("provenance", {}).get("config", {})
    labels = bundle.manifest.get("provenance", {}).get("dataset", {}).get("labels")
    flags = ["--labels LABELS"] if labels else []
    names = (HEAD_FLAGS if config.get("head") == "logistic" else ()) + TRAIN_FLAGS
    flags += [f"--{name.replace('_', '-')} {config[name]}" for name in names if config.get(name) is not None]
    flags += [f"--unfreeze {shlex.join(config['unfreeze'])}"] if config.get("unfreeze") else []
    flags += ["--augment"] if config.get("augment") else []
    flags += [
        f"--{name.replace('_', '-')} {shlex.quote(config[name])}"
        for name in ("class_weights", "sampling", "class_frequencies", "target_precision")
        if config.get(name) not in (None, "none", "training")
    ]
    flags += ["--reviews reviews.csv"]
    flags += ["--extra-data production"] if has_extra_data else []
    new = _run_names(bundle)[1]
    return f"finetune train {_data_dir()} --backbone {bundle.backbone} {' '.join(flags)} --output-dir {new}"


def serve_both_command(bundle: Bundle) -> str:
    """Return the command that serves the retrained model and shows the active one as well."""
    settings = services().settings
    path = bundle.path
    with contextlib.suppress(UserError):  # prefer the operator's own path, if it still leads to the bundle
        path = settings.bundle if resolve_bundle(settings.bundle) == path else path
    last, new = _run_names(bundle)
    return f"BUNDLE={last or new}/bundle EVALUATIONS={shlex.quote(str(path))} DATA_DIR={_data_dir()} python -m service"


def _run_names(bundle: Bundle) -> tuple[str, str]:
    """Return the last run folder of a retrained model, if there is one, and the first that does not exist."""
    base, _, number = re.fullmatch(r"(.*?)(-reviewed(?:-(\d+))?)?", bundle.name, re.DOTALL).groups()  # type: ignore[union-attr]
    is_reviewed = bundle.name != base
    last, n = "", int(number or 1) + 1 if is_reviewed else 1
    while (run := RUNS / (f"{base}-reviewed" + (f"-{n}" if n > 1 else ""))).exists():
        last, n = shlex.quote(str(run)), n + 1
    return last, shlex.quote(str(run))


def _data_dir() -> str:
    settings = services().settings
    return shlex.quote(str(settings.data_dir)) if settings.data_dir else "DATA"
