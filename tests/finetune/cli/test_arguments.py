"""The folder that a command is about is an argument without a flag, or the flag that other commands have for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.__main__ import main

DATA_COMMANDS = {"train": (), "audit": (), "tune": (), "compare": ("--backbones", "small")}
BUNDLE_COMMANDS = ("evaluate", "visualize", "threshold", "quantize", "merge")


def error(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flag", [(), ("--data-dir",)])
@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_data_folder(command: str, flag: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "absent"
    message = error(capsys, command, *DATA_COMMANDS[command], *flag, folder)
    assert message == f"finetune: No such folder: {folder}. Expected a folder with photos in train/CLASS/ and valid/CLASS/."


@pytest.mark.parametrize("flag", [(), ("--bundle",)])
@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
def test_bundle(command: str, flag: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data-dir", str(tmp_path)) if command in ("evaluate", "quantize") else ()
    message = error(capsys, command, *flag, tmp_path / "absent", *data)
    assert message.startswith(f"finetune: {tmp_path}/absent is not a bundle: it has no manifest.json.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["train", "a", "--data-dir", "b"],
            "Argument --data-dir: not allowed with argument DATA. See `finetune train --help`.",
        ),
        (
            ["evaluate", "--bundle", "a", "b"],
            "Argument BUNDLE: not allowed with argument --bundle. See `finetune evaluate --help`.",
        ),
        (["evaluate"], "One of the arguments --bundle BUNDLE is required. See `finetune evaluate --help`."),
    ],
)
def test_two_folders_or_none(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, *words) == f"finetune: {expected}"


def test_a_folder_after_the_flags_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "absent") in error(capsys, "train", "--epochs", "1", tmp_path / "absent")
    assert str(tmp_path / "absent") in error(capsys, "train", "--data-dir", tmp_path / "absent", "--epochs", "1")
