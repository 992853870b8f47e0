"""``finetune train --preset``: the settings that ``finetune tune`` chose for a data set."""

from __future__ import annotations

import dataclasses

from finetune.config import Config
from models.artifacts.tuning_result import TUNING_FILE, default_tuning_dir, read_preset
from models.errors import ConfigError


def apply_preset(config: Config) -> Config:
    """Return the settings with those of the preset, if they name one.

    Raises:
        ConfigError: The data set was not tuned, or the file is not a result of ``finetune tune``.
    """
    if config.preset is None:
        return config
    file = config.tuning or default_tuning_dir(config.data_dir) / TUNING_FILE
    if not file.is_file():
        raise ConfigError(f"--preset needs {file}. Run `finetune tune {config.data_dir}` first, or pass --tuning FILE.")
    return dataclasses.replace(config, **read_preset(file, config.preset), preset=None, tuning=None)
