"""The README says what there is: no more, no less."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from finetune.__main__ import COMMANDS, MODULES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_has_a_row_in_the_readme() -> None:
    rows = set(re.findall(r"^\| `finetune (\w+)", README, flags=re.MULTILINE))
    assert rows == set(COMMANDS)


def test_every_make_target_in_the_readme_exists_and_is_helped() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)\b", README)) - {"help"}
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets <= set(re.findall(r"^make (\w+)", listed, flags=re.MULTILINE))


def test_every_flag_in_the_readme_is_a_flag() -> None:
    known = {"--read-only", "--tmpfs", "--stop-timeout", "--user"}  # docker's
    known |= {"--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port"}  # torchrun's
    for name in COMMANDS:
        parser = argparse.ArgumentParser(conflict_handler="resolve")
        importlib.import_module(f"finetune.{MODULES.get(name, name)}").add_arguments(parser)
        known |= set(re.findall(r"--[a-z-]+", parser.format_help()))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert flag in known, flag


def test_the_files_that_the_readme_links_to_are_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("text", [README, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")], ids=["README", "CHANGELOG"])
def test_no_placeholder_is_left(text: str) -> None:
    assert "@@" not in text
    assert "TODO" not in text
