"""``finetune train --preset``: the settings that ``finetune tune`` chose for a dataset."""

from __future__ import annotations

import dataclasses

from finetune.config import Config
from models.artifacts.tuning_result import TUNING_FILE, default_tuning_dir, read_preset
from models.errors import ConfigError


def apply_preset(config: Config) -> Config:
    """Return the settings with those of the preset, if they name one. Its head is refit unless the settings say otherwise.

    Raises:
        ConfigError: The dataset was not tuned, or the file is not a result of ``finetune tune``.
    """
    if config.preset is None:
        return config
    file = config.tuning or default_tuning_dir(config.data_dir) / TUNING_FILE
    if not file.is_file():
        raise ConfigError(f"--preset needs {file}. Run `finetune tune {config.data_dir}` first, or pass --tuning FILE.")
    refit = config.feature_cache if config.refit is None else config.refit
    return dataclasses.replace(config, **read_preset(file, config.preset), refit=refit, preset=None, tuning=None)
