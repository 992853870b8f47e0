"""The progress of a training, as its events tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from service.studio.curves import HEIGHT, WIDTH, curve
from service.studio.job_progress import JobProgress, ProgressReader, estimate_s


def epoch(number: int, *, seconds: float = 2.0, **values: Any) -> dict[str, Any]:
    row = {"epoch": number, "train_loss": 1 / number, "valid_loss": 2 / number, "train_accuracy": 0.5, "valid_accuracy": 0.75}
    return {"event": "epoch", "time": 100.0 + number, "seconds": seconds, "best_epoch": number, **row, **values}


def events() -> list[dict[str, Any]]:
    return [
        {"event": "step", "time": 1.0, "text": "Loading PyTorch"},
        {"event": "images", "time": 10.0, "phase": "inspection", "done": 0, "total": 100},
        {"event": "images", "time": 12.0, "phase": "inspection", "done": 40, "total": 100},
        {"event": "images", "time": 15.0, "phase": "inspection", "done": 100, "total": 100},
        {"event": "training", "time": 16.0, "epochs": 4, "epoch": 0, "train": 80, "valid": 20},
        epoch(1, images_per_second=40.0),
        epoch(2, seconds=4.0, images_per_second=20.0),
    ]


def after(count: int) -> JobProgress:
    progress = JobProgress()
    for event in events()[:count]:
        progress.add(event)
    return progress


def test_each_event_changes_what_is_shown() -> None:
    assert (after(1).step, after(1).fraction, after(1).seconds_left) == ("Loading PyTorch", None, None)
    reading = after(3)
    assert (reading.step, reading.done, reading.total) == ("Reading the photos", 40, 100)
    assert (reading.images_per_second, reading.seconds_left, reading.fraction) == (20.0, 3.0, 0.4)
    assert (after(5).step, after(5).epochs, after(5).fraction) == ("Training", 4, 0.0)
    training = after(7)
    assert (training.epoch, training.fraction, training.images_per_second) == (2, 0.5, 20.0)
    assert training.seconds_left == 2 * 3.0


def test_a_resumed_training_drops_the_epochs_after_its_checkpoint() -> None:
    progress = after(7)
    progress.add({"event": "training", "time": 200.0, "epochs": 4, "epoch": 1, "train": 80, "valid": 20})
    assert progress.epoch == 1
    progress.add(epoch(2))
    assert [row["epoch"] for row in progress.history] == [1, 2]


def test_the_time_of_a_training_is_estimated_from_the_speed_of_another() -> None:
    speed = after(7).speed(total_s=30.0)
    assert speed
    assert speed["other_s"] == 30.0 - 5.0 - 2 * 3.0
    assert estimate_s(speed, images=100, epochs=None) == pytest.approx(5.0 + 2 * 3.0 * 100 / 80 + 19.0)
    assert estimate_s(speed, images=200, epochs=1) == pytest.approx(10.0 + 3.0 * 200 / 80 + 19.0)
    assert after(3).speed(total_s=30.0) is None


def test_a_file_is_read_from_where_the_last_reading_ended(tmp_path: Path) -> None:
    path, reader = tmp_path / "progress.jsonl", ProgressReader()
    assert reader.read(path).events == 0
    lines = [json.dumps(event) + "\n" for event in events()]
    path.write_text("".join(lines[:2]) + lines[2][:20])
    assert reader.read(path).events == 2
    path.write_text("".join(lines[:2]) + lines[2][:20] + "\n" + "".join(lines[3:]))  # a killed process left an incomplete line
    assert (reader.read(path).events, reader.read(path).epoch) == (6, 2)
    path.write_text(lines[0])  # of another training
    assert reader.read(path).step == "Loading PyTorch"


def test_curves_lie_inside_of_the_chart() -> None:
    rows = [epoch(n, valid_accuracy_low=0.6, valid_accuracy_high=0.9) for n in range(1, 1000)]
    for name in ("loss", "accuracy"):
        drawn = curve(name, rows, name, epochs=1000)
        points = [tuple(map(float, pair.split(","))) for pair in f"{drawn.train} {drawn.valid} {drawn.band}".split()]
        assert 100 < len(points) < 1100
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
        assert drawn.last == tuple(map(float, drawn.valid.split()[-1].split(",")))
        assert f"after epoch {len(rows)}:" in drawn.summary
    assert curve("Loss", [], "loss", epochs=0).summary == "Loss: no epoch is finished yet."
    assert curve("Loss", rows[:2], "loss", epochs=2).summary == "Loss after epoch 2: training 0.500, validation 1.000."


@pytest.mark.parametrize(
    ("name", "low", "high", "ticks"),
    [
        ("accuracy", 0.43, 0.88, ["20%", "40%", "60%", "80%", "100%"]),
        ("accuracy", 0.975, 0.995, ["96%", "97%", "98%", "99%", "100%"]),
        ("accuracy", 0.05, 0.95, ["0%", "25%", "50%", "75%", "100%"]),
        ("accuracy", 0.71, 0.78, ["70%", "75%", "80%"]),
        ("loss", 0.031, 0.69, ["0", "0.2", "0.4", "0.6", "0.8"]),
        ("loss", 0.31, 0.34, ["0.3", "0.32", "0.34", "0.36"]),
        ("loss", 12.0, 950.0, ["0", "500", "1000", "1500"]),
    ],
)
def test_the_ticks_of_the_y_axis_are_round(name: str, low: float, high: float, ticks: list[str]) -> None:
    rows = [epoch(number, **{f"train_{name}": low, f"valid_{name}": high}) for number in (1, 2)]
    assert [text for _, text in curve(name, rows, name, epochs=2).y_labels] == ticks


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    rows = [epoch(1), epoch(2, train_loss=math.nan, valid_loss=math.inf)]
    drawn = curve("Loss", rows, "loss", epochs=2)
    assert (drawn.train.count(","), drawn.valid.count(","), drawn.last) == (1, 1, None)
