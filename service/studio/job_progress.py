"""Read the progress that ``finetune train --progress-file`` writes: the current step, images, epochs and speed."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.networks.spec import LOGISTIC

MAX_READERS = 32
TRAINING = "Training"
PHASES = {"inspection": "Reading the photos", "features": "Computing features"}
SPEED_EPOCHS = 5  # the time left is estimated from the last epochs


@dataclass
class JobProgress:
    """What is known about a training run.

    Attributes:
        step: The current step.
        done: Images of the step that are done, if it counts them.
        total: All images of the step.
        images_per_second: Measured in this step, or in the last epoch.
        head: How the last layer is trained, "" until it is known. The logistic one has no epochs, and one row of history.
        epochs: The number of epochs to train, 0 until it is known.
        history: The events of the finished epochs, in order.
        train_images: Number of training images.
        seconds: Seconds of the finished phases, by name.
        events: Number of events read. It identifies the state.
    """

    step: str = ""
    done: int = 0
    total: int = 0
    images_per_second: float | None = None
    head: str = ""
    epochs: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    train_images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    images: int = 0
    events: int = 0
    _began: float = 0.0

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def best(self) -> dict[str, Any]:
        """The best epoch so far, empty before the first one has finished."""
        number = self.history[-1]["best_epoch"] if self.history else 0
        return next((row for row in self.history if row["epoch"] == number), {})

    @property
    def has_epochs(self) -> bool:
        return self.head != LOGISTIC

    @property
    def seconds_left(self) -> float | None:
        """How long the current step will probably take, or None."""
        if self.step == TRAINING and self.history and self.epoch < self.epochs:
            seconds = [row["seconds"] for row in self.history[-SPEED_EPOCHS:]]
            return float((self.epochs - self.epoch) * sum(seconds) / len(seconds))
        if self.total and self.images_per_second and self.step in PHASES.values():
            return (self.total - self.done) / self.images_per_second
        return None

    @property
    def fraction(self) -> float | None:
        """How much of the current step is done, from 0 to 1, or None."""
        if self.step == TRAINING:
            return self.epoch / self.epochs if self.epochs and self.has_epochs else None
        return self.done / self.total if self.total else None

    def add(self, event: dict[str, Any]) -> None:
        """Apply an event."""
        self.events += 1
        name, time = event["event"], float(event["time"])
        if name == "images":
            self._add_images(event, time)
        elif name == "training":
            self.step, self.done, self.total = TRAINING, 0, 0
            self.head = str(event.get("head", ""))
            self.epochs, self.train_images = int(event["epochs"]), int(event["train"])
            self.history = [row for row in self.history if row["epoch"] <= event["epoch"]]
        elif name == "epoch":
            self.history = [row for row in self.history if row["epoch"] < event["epoch"]] + [event]
            self.images_per_second = event.get("images_per_second")
            if self.epoch >= self.epochs:
                self.step = "Evaluating"
        elif name == "step":
            self.step, self.done, self.total = str(event["text"]), 0, 0

    def _add_images(self, event: dict[str, Any], time: float) -> None:
        self.step = PHASES.get(event["phase"], str(event["phase"]))
        self.done, self.total = int(event["done"]), int(event["total"])
        if self.done == 0:
            self._began, self.images_per_second = time, None
        elif time > self._began:
            self.images_per_second = self.done / (time - self._began)
        if self.done == self.total:
            self.seconds[event["phase"]] = time - self._began
            self.images = max(self.images, self.total)

    def speed(self, total_s: float) -> dict[str, float] | None:
        """Return the measured speed of a finished training, by which later ones are estimated, if it is known.

        Args:
            total_s: Seconds from its start to its end.
        """
        if not self.history or not self.images or not self.train_images:
            return None
        epoch_s = sum(row["seconds"] for row in self.history) / len(self.history)
        reading_s = sum(self.seconds.values())
        other_s = max(0.0, total_s - reading_s - epoch_s * len(self.history))
        return {
            "reading_s_per_image": reading_s / self.images,
            "epoch_s_per_image": epoch_s / self.train_images,
            "other_s": other_s,
            "epochs": len(self.history),
            "images": self.images,
            "total_s": total_s,
        }


def estimate_s(speed: dict[str, float], *, images: int, epochs: int | None) -> float:
    """Estimate the seconds of a training from the speed of an earlier one.

    Args:
        speed: Of the earlier training.
        images: All images of the new one.
        epochs: Its epochs, or None for as many as the earlier one had.
    """
    per_epoch = speed["epoch_s_per_image"] * images
    return speed["reading_s_per_image"] * images + per_epoch * (epochs or speed["epochs"]) + speed["other_s"]


class ProgressReader:
    """Reads progress files, each from where the last reading ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Path, tuple[int, JobProgress]] = OrderedDict()

    def read(self, path: Path) -> JobProgress:
        """Return the progress in a file, which may not exist yet."""
        with self._lock:
            offset, progress = self._known.pop(path, (0, JobProgress()))
            try:
                with path.open("rb") as file:
                    if file.seek(0, 2) < offset:  # the file of a deleted training
                        offset, progress = 0, JobProgress()
                    file.seek(offset)
                    complete = file.read().rpartition(b"\n")[0]
            except FileNotFoundError:
                return JobProgress()
            for line in complete.splitlines():
                try:
                    progress.add(json.loads(line))
                except (ValueError, KeyError, TypeError):  # an empty line, or one that a killed process left incomplete
                    continue
            self._known[path] = offset + len(complete) + bool(complete), progress
            while len(self._known) > MAX_READERS:
                self._known.popitem(last=False)
            return replace(progress, history=list(progress.history), seconds=dict(progress.seconds))
