"""Print the steps of a long command, and write its progress as events for programs.

Events are lines of JSON with ``time`` (seconds since 1970) and ``event``: "step" (``text``), "images" (``phase``, ``done``,
``total``), "training" (before the first epoch) and "epoch". They are written in a block of ``events_to`` only.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

IMAGES_INTERVAL_S = 0.5  # interval of events with the number of images

_events: TextIO | None = None


@contextlib.contextmanager
def events_to(path: Path | None) -> Iterator[None]:
    """Append the events of the block to a file; with None, write no events."""
    global _events
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        if file.tell():
            file.write("\n")  # a killed process may have left an incomplete line
        _events = file
        try:
            yield
        finally:
            _events = None


def report(event: str, **values: Any) -> None:
    """Write an event."""
    if _events:
        _events.write(json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n")


class ImageCounter:
    """Reports how many images of a phase are done, at most every IMAGES_INTERVAL_S and when all are."""

    def __init__(self, phase: str, total: int) -> None:
        self._phase, self._total, self._done = phase, total, 0
        self._next = time.monotonic() + IMAGES_INTERVAL_S
        report("images", phase=phase, done=0, total=total)

    def add(self, count: int = 1) -> None:
        """Count images."""
        self._done += count
        if self._done == self._total or time.monotonic() >= self._next:
            self._next = time.monotonic() + IMAGES_INTERVAL_S
            report("images", phase=self._phase, done=self._done, total=self._total)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Print what the block does, and report it as an event. On a terminal, update the elapsed seconds until it ends."""
    report("step", text=text)
    if not sys.stdout.isatty():
        print(f"{text} ...")
        yield
        return
    started, ended = time.monotonic(), threading.Event()

    def show() -> None:
        print(f"\r{text} ... {time.monotonic() - started:.0f} s", end="", flush=True)

    def update() -> None:
        show()
        while not ended.wait(1):
            show()

    thread = threading.Thread(target=update, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show()
        print()
