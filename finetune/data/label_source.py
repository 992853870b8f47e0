"""Locate the data folder and the table of labels that a command was given."""

from __future__ import annotations

from pathlib import Path

from finetune.config import default_data_dir
from models.errors import ConfigError


def locate_data(data_dir: Path | None, labels: str | None) -> tuple[Path, Path | None]:
    """Return the data folder, and the table of labels if there is one.

    Args:
        data_dir: The data folder. None: the table's folder.
        labels: Path of the table, or None if the labels are the names of the folders.

    Raises:
        ConfigError: Both are missing.
    """
    if labels is None:
        if data_dir is None:
            raise ConfigError("No data. Pass the data folder, or a table of labels with --labels.")
        return data_dir, None
    return data_dir or default_data_dir(labels), Path(labels).expanduser()
