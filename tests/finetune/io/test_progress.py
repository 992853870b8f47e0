"""The steps that a command prints."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from finetune.io import progress
from finetune.io.progress import ImageCounter, events_to, report, step


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


def test_events_are_appended_after_what_a_killed_process_left(tmp_path: Path) -> None:
    file = tmp_path / "run" / "progress.jsonl"
    report("ignored")
    with events_to(file):
        report("epoch", epoch=1)
    with file.open("a") as text:
        text.write('{"time": 1')
    with events_to(file), step("Drawing"):
        pass
    report("ignored")
    first, incomplete, second = file.read_text(encoding="utf-8").splitlines()
    assert (json.loads(first)["event"], json.loads(first)["epoch"]) == ("epoch", 1)
    assert incomplete == '{"time": 1'
    assert (json.loads(second)["event"], json.loads(second)["text"]) == ("step", "Drawing")


def test_the_number_of_images_is_reported_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with events_to(tmp_path / "events"):
        counter = ImageCounter("inspection", 100)
        for _ in range(50):
            counter.add()
        monkeypatch.setattr(progress, "IMAGES_INTERVAL_S", -1.0)
        counter._next = 0.0
        counter.add(10)
        counter.add(40)
    rows = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [row["done"] for row in rows] == [0, 60, 100]
