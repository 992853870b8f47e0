"""``finetune train --preset``: the settings that ``finetune tune`` chose for a data set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from finetune.config import SELECTED_BY_PRESET, Config
from models.errors import ConfigError

TUNING_FILE = "tune.json"


def default_tuning_dir(data_dir: Path) -> Path:
    """Return the folder that ``finetune tune`` writes to by default."""
    return Path("runs") / f"{data_dir.resolve().name}-tune"


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
    try:
        chosen = json.loads(file.read_text(encoding="utf-8"))["presets"][config.preset]
        settings = {name: chosen[name] for name in SELECTED_BY_PRESET}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a result of `finetune tune` ({type(error).__name__}). Run it again.") from None
    return dataclasses.replace(config, **settings, preset=None, tuning=None)
