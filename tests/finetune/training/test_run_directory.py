"""Whether a run may be resumed with the given settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.config import Config
from finetune.training.run_directory import CONFIG, create_run, require_same_settings
from models.errors import RunError


def test_a_run_of_a_version_without_a_setting_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = Config(head="linear", lr=0.1)
    create_run(folder, config)
    saved = yaml.safe_load((folder / CONFIG).read_text())
    del saved["head"]
    (folder / CONFIG).write_text(yaml.safe_dump(saved))
    require_same_settings(folder, config)
    with pytest.raises(RunError, match=r"was started with --lr 0\.1, not 0\.2\. Remove --lr, or start another run\."):
        require_same_settings(folder, Config(head="linear", lr=0.2))
