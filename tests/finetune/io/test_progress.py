"""The steps that a command prints."""

from __future__ import annotations

import io
import sys

import pytest

from finetune.io.progress import step


def test_a_step_is_one_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with step("Drawing"):
        assert capsys.readouterr().out == "Drawing ...\n"
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_the_elapsed_seconds_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with pytest.raises(ValueError, match="stop"), step("Drawing"):
        raise ValueError("stop")
    assert terminal.getvalue().startswith("\rDrawing ... 0 s")
    assert terminal.getvalue().endswith(" s\n")
