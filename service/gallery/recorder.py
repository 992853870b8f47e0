"""Answered photos on their way into the gallery: handed over in no time, written together by a thread of its own."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
from flask import url_for
from numpy.typing import NDArray

from models.artifacts.bundle import Bundle
from service.db.ingest import get_or_create_model
from service.db.production import ServedPrediction, production_name, prune, save_predictions
from service.gallery.index import GalleryIndex
from service.http.errors import Problem
from service.settings import Settings
from service.telemetry.metrics import Metrics

log = logging.getLogger("service.gallery")
QUEUE_SIZE = 128  # photos in memory; under a flood the others are not kept, and counted
BATCH_SIZE = 32
PRUNE_INTERVAL_S = 60.0


@dataclass(frozen=True, eq=False)
class _Offer:
    bundle: Bundle
    answered: ServedPrediction


class PredictionRecorder:
    """Keeps what was answered, as SAVE_PREDICTIONS says; a thread that ends with ``close``, when all is written."""

    def __init__(self, gallery: GalleryIndex, settings: Settings, metrics: Metrics) -> None:
        self._gallery = gallery
        self._settings = settings
        self._metrics = metrics
        self._offers: queue.Queue[_Offer | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def record(self, bundle: Bundle, data: bytes, probabilities: NDArray[np.float32]) -> None:
        """Hand a photo and its answer over; never waits."""
        answered = ServedPrediction(data, hashlib.sha256(data).hexdigest(), probabilities, datetime.now(timezone.utc))
        try:
            self._offers.put_nowait(_Offer(bundle, answered))
        except queue.Full:
            self._metrics.saved_predictions.labels("dropped").inc()

    def page_url(self, version: str, data: bytes) -> str:
        """Return the address of the page of an image that the model of this version predicted."""
        sha256 = hashlib.sha256(data).hexdigest()
        return url_for("photo.page", model=version, photo=production_name(sha256), sha256=sha256)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what was handed over and end."""
        self._offers.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pruned_at, is_last = -PRUNE_INTERVAL_S, False
        while not is_last:
            offers, is_last = self._take()
            try:
                self._write(offers)
                if time.monotonic() - pruned_at >= PRUNE_INTERVAL_S:
                    pruned_at = time.monotonic()
                    with self._gallery.database.write() as connection:
                        prune(connection, max_images=self._settings.max_saved, days=self._settings.retention_days)
            except Exception as error:  # the next ones may be kept again
                self._metrics.saved_predictions.labels("dropped").inc(len(offers))
                log.warning("photos are not kept: %s", error, exc_info=not isinstance(error, Problem))

    def _take(self) -> tuple[list[_Offer], bool]:
        """What was handed over, AT_ONCE at most, and whether it is the end; nothing after a while without any."""
        taken: list[_Offer] = []
        with contextlib.suppress(queue.Empty):
            while len(taken) < BATCH_SIZE:
                record = self._offers.get(block=not taken, timeout=PRUNE_INTERVAL_S)
                if record is None:
                    return taken, True
                taken.append(record)
        return taken, False

    def _write(self, offers: Sequence[_Offer]) -> None:
        for version in dict.fromkeys(record.bundle.version for record in offers):
            mine = [record for record in offers if record.bundle.version == version]
            bundle = mine[0].bundle
            with self._gallery.database.write() as connection:
                model_id = get_or_create_model(connection, version=version, name=bundle.name, classes=bundle.classes)
                new = save_predictions(connection, model_id, bundle.classes, [record.answered for record in mine])
            self._metrics.saved_predictions.labels("saved").inc(new)
            self._metrics.saved_predictions.labels("duplicate").inc(len(mine) - new)
