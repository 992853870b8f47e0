"""The data of a training: a data set of the studio, or a folder below DATA_DIR. Nothing else can be named."""

from __future__ import annotations

from pathlib import Path

from models.errors import ConfigError
from service.settings import Settings

DATASET, FOLDER = "dataset:", "folder:"  # begin the name of a data set, or a path below DATA_DIR


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
            raise ConfigError(f"Data: there is no data set {name[:80]!r}.")
    elif data.startswith(FOLDER) and settings.data_dir is not None:
        root, name = settings.data_dir, data.removeprefix(FOLDER)
    else:
        raise ConfigError("Data: choose a data set, or a folder below DATA_DIR.")
    try:
        base = root.resolve()
        path = (base / name).resolve()
        is_inside = path.is_relative_to(base) and path.is_dir()
    except (OSError, ValueError, RuntimeError):  # for example a NUL, or a loop of links
        is_inside = False
    if not is_inside or Path(name).is_absolute():
        where = "in the studio" if data.startswith(DATASET) else "below DATA_DIR"
        raise ConfigError(f"Data: there is no folder {name[:80]!r} {where}.")
    return path


def describe_data(data: str) -> str:
    """Return how a page names the data of a training."""
    if data.startswith(DATASET):
        return data.removeprefix(DATASET)
    return f"DATA_DIR/{data.removeprefix(FOLDER)}".rstrip("/")
