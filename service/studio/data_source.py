"""The data of a training: a dataset of the studio, or a folder below DATA_DIR. Nothing else can be named."""

from __future__ import annotations

import os
from pathlib import Path

from models.artifacts.data_folder import TABLE_EXTENSIONS, is_table_name
from models.errors import ConfigError
from service.settings import Settings

DATASET, FOLDER = "dataset:", "folder:"  # begin the name of a dataset, or a path below DATA_DIR


def resolve_data(settings: Settings, data: str) -> Path:
    """Return the folder that a form names, with its links resolved.

    Args:
        settings: The settings of the service.
        data: ``dataset:NAME``, or ``folder:PATH`` with a path below DATA_DIR (``folder:`` is DATA_DIR itself).

    Raises:
        ConfigError: There is no such folder, or it lies elsewhere.
    """
    if data.startswith(DATASET):
        root, name = settings.resolved_studio_dir / "datasets", data.removeprefix(DATASET)
        if not name or "/" in name or "." in name:
            raise ConfigError(f"Data: there is no dataset {name[:80]!r}.")
    elif data.startswith(FOLDER) and settings.data_dir is not None:
        root, name = settings.data_dir, data.removeprefix(FOLDER)
    else:
        raise ConfigError("Data: choose a dataset, or a folder below DATA_DIR.")
    path = _resolve_inside(root, name)
    if path is None or not os.path.isdir(path):
        where = "in the studio" if data.startswith(DATASET) else "below DATA_DIR"
        raise ConfigError(f"Data: there is no folder {name[:80]!r} {where}.")
    return path


def resolve_table(folder: Path, name: str) -> Path:
    """Return the table of labels that a form names by its path below the data folder. Raises ConfigError if there is none."""
    path = _resolve_inside(folder, name)
    if path is None or not os.path.isfile(path) or not is_table_name(path.name):
        raise ConfigError(f"Table of labels: the data folder has no table {name[:80]!r} ({', '.join(TABLE_EXTENSIONS)}).")
    return path


def _resolve_inside(root: Path, name: str) -> Path | None:
    """Return a path below ``root`` with its links resolved, or None if it leads elsewhere."""
    try:
        base = root.resolve()
        path = (base / name).resolve()
        return path if path.is_relative_to(base) and not Path(name).is_absolute() else None
    except (OSError, ValueError, RuntimeError):  # for example a NUL, or a loop of links
        return None


def describe_data(data: str) -> str:
    """Return how a page names the data of a training."""
    if data.startswith(DATASET):
        return data.removeprefix(DATASET)
    return f"DATA_DIR/{data.removeprefix(FOLDER)}".rstrip("/")
