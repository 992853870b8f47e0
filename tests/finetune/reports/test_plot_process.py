"""Plots are drawn in a process of their own, which reports its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.reports.plot_process import PlotProcess
from models.artifacts.predictions import Predictions

PREDICTIONS = Predictions(
    ("cats", "dogs"),
    ("valid/a.jpg", "valid/b.jpg"),
    np.array([0, 1]),
    np.array([[0.9, 0.1], [0.2, 0.8]]),
    ("valid", "valid"),
    ("0" * 64, "1" * 64),
)
OPTIONS = {"predictions": PREDICTIONS, "data_dir": None, "history": None, "uncalibrated": None}


def test_the_plots_are_written_when_it_has_ended(tmp_path: Path) -> None:
    with PlotProcess() as plots:
        plots.start(tmp_path / "plots", **OPTIONS)
        plots.wait()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "confusion_matrix.png",
        "reliability.png",
        "thresholds.png",
    ]


def test_an_error_of_the_system_is_raised_by_the_caller(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file in place of the folder")
    with PlotProcess() as plots:
        plots.start(tmp_path / "plots", **OPTIONS)
        with pytest.raises(OSError, match="plots"):
            plots.wait()
