"""The recorder of production images: what waits for the database is limited in bytes, and a failure loses nothing else."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

import service.gallery.recorder
from models.artifacts.bundle import Bundle
from service.db.connection import Database
from service.db.errors import DatabaseUnavailableError
from service.db.schema import production_images
from service.gallery.recorder import PredictionRecorder
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.helpers.server import RESPONSE_TIMEOUT_S, poll

KIB = 1 << 10
BUNDLE = Bundle(Path(), {"name": "tiny", "classes": ["blue", "red"], "sha256": "ab" * 32})


class SlowGallery:
    """A gallery whose database is available once ``may_write`` is set, and fails while ``is_broken``."""

    def __init__(self, database: Database) -> None:
        self.may_write = threading.Event()
        self.is_broken = False
        self._database = database

    @property
    def database(self) -> Database:
        self.may_write.wait(RESPONSE_TIMEOUT_S)
        if self.is_broken:
            raise DatabaseUnavailableError("locked")
        return self._database

    def saved(self) -> set[str]:
        with self._database.read() as connection:
            return set(connection.execute(select(production_images.c.sha256)).scalars())


@pytest.fixture
def gallery(new_database: Any) -> Iterator[SlowGallery]:
    with new_database("sqlite") as url:
        database = Database(url)
        yield SlowGallery(database)
        database.close()


@pytest.fixture
def recorder(gallery: SlowGallery) -> Iterator[SimpleNamespace]:
    """A recorder whose queue holds 1 MiB, with functions to record random bytes and to read its metrics."""
    metrics = Metrics()
    running = PredictionRecorder(gallery, Settings(save_queue_mb=1), metrics)  # type: ignore[arg-type]

    def record(size: int) -> str:
        data = os.urandom(size)
        running.record(BUNDLE, data, np.array([0.25, 0.75], np.float32))
        return hashlib.sha256(data).hexdigest()

    def count(outcome: str) -> float:
        return metrics.registry.get_sample_value("classifier_saved_predictions_total", {"outcome": outcome}) or 0.0

    def close() -> None:
        gallery.may_write.set()
        running.close(RESPONSE_TIMEOUT_S)

    yield SimpleNamespace(record=record, count=count, close=close)
    close()


def test_images_beyond_the_bytes_of_the_queue_are_dropped_and_counted(gallery: SlowGallery, recorder: SimpleNamespace) -> None:
    first = recorder.record(600 * KIB)
    recorder.record(600 * KIB)
    assert recorder.count("dropped") == 1
    small = recorder.record(400 * KIB)
    recorder.record(400 * KIB)
    assert recorder.count("dropped") == 2
    gallery.may_write.set()
    poll(lambda: recorder.count("saved") == 2)
    assert gallery.saved() == {first, small}
    last = poll(lambda: recorder.count("dropped") == 2 and recorder.record(1024 * KIB))  # the queue is free again
    poll(lambda: recorder.count("saved") == 3)
    assert gallery.saved() == {first, small, last}


def test_images_that_were_saved_are_not_counted_as_dropped_if_older_ones_cannot_be_removed(
    gallery: SlowGallery, recorder: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **limits: object) -> None:
        raise DatabaseUnavailableError("locked")

    monkeypatch.setattr(service.gallery.recorder, "prune", fail)
    gallery.may_write.set()
    saved = recorder.record(KIB)
    poll(lambda: recorder.count("saved") == 1)
    recorder.close()
    assert recorder.count("dropped") == 0
    assert gallery.saved() == {saved}


def test_a_failing_database_frees_the_queue_and_later_images_are_saved(gallery: SlowGallery, recorder: SimpleNamespace) -> None:
    gallery.is_broken = True
    recorder.record(1024 * KIB)
    gallery.may_write.set()
    poll(lambda: recorder.count("dropped") == 1)
    gallery.is_broken = False

    def is_recorded() -> bool:
        recorder.record(1024 * KIB)
        return bool(gallery.saved())

    poll(is_recorded)
