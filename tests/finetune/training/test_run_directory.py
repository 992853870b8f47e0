"""A run directory belongs to one process at a time."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from finetune.config import Config
from finetune.training import run_directory
from models.errors import RunError
from tests.helpers.tiny_network import file_size_limit


def test_of_two_new_runs_in_one_folder_the_second_is_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_directory.require_no_run(folder)  # both processes pass this check before either creates the run
    run_directory.create_run(folder, Config(lr=0.1))
    with pytest.raises(RunError, match=re.escape(f"{folder} already contains a run.")):
        run_directory.create_run(folder, Config(lr=0.2))
    assert run_directory.read_config(folder)["lr"] == 0.1


def test_a_run_is_locked_while_a_process_trains_in_it(tmp_path: Path) -> None:
    run_directory.create_run(tmp_path, Config())
    with (
        run_directory.locked(tmp_path),
        pytest.raises(RunError, match=r"Another process is training in .*\. Wait until it ends"),
        run_directory.locked(tmp_path),
    ):
        pass
    with run_directory.locked(tmp_path):
        assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_full_disk_leaves_no_run(tmp_path: Path) -> None:
    with file_size_limit(16), pytest.raises(OSError, match="File too large"):
        run_directory.create_run(tmp_path / "run", Config())
    run_directory.require_no_run(tmp_path / "run")
