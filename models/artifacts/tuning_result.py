"""``tune.json``: the settings that ``finetune tune`` chose for a dataset, by the name of their preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.errors import ConfigError

TUNING_FILE = "tune.json"
PRESETS = ("best", "balanced", "fast")
SELECTED_BY_PRESET = ("backbone", "head", "normalization", "penalty")


def default_tuning_dir(data_dir: Path) -> Path:
    """Return the folder that ``finetune tune`` writes to by default."""
    return Path("runs") / f"{data_dir.resolve().name}-tune"


def read_preset(file: Path, preset: str) -> dict[str, Any]:
    """Read the settings of a preset. Raises ConfigError if the file is not a result of ``finetune tune``."""
    try:
        chosen = json.loads(file.read_text(encoding="utf-8"))["presets"][preset]
        return {name: chosen[name] for name in SELECTED_BY_PRESET}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a result of `finetune tune` ({type(error).__name__}). Run it again.") from None
