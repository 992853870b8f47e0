"""Locate the data folder and the table of labels that a command was given."""

from __future__ import annotations

from pathlib import Path

from finetune.config import HUB, default_data_dir
from models.errors import ConfigError


def locate_data(data_dir: Path | None, labels: str | None) -> tuple[Path, Path | None]:
    """Return the data folder, and the table of labels if there is one.

    Args:
        data_dir: The data folder. None: the table's folder, or data/NAME.
        labels: Path of the table, or hf://NAME for a dataset of the Hugging Face Hub, which is saved to ``data_dir`` first.
            None if the labels are the names of the folders.

    Raises:
        ConfigError: Both are missing.
        DataError: The dataset cannot be saved.
    """
    if labels is None:
        if data_dir is None:
            raise ConfigError("No data. Pass the data folder, or a table of labels with --labels.")
        return data_dir, None
    folder = data_dir or default_data_dir(labels)
    if labels.startswith(HUB):
        from finetune.data.huggingface import save_hub_dataset  # slow to import

        return folder, save_hub_dataset(labels, folder)
    return folder, Path(labels).expanduser()
