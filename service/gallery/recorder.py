"""Save the images and predictions of /predict requests for the gallery, in a background thread."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
from flask import url_for
from numpy.typing import NDArray

from models.artifacts.bundle import Bundle
from models.errors import UserError
from service.db.ingest import get_or_create_model
from service.db.production import ServedPrediction, production_name, prune, save_predictions
from service.gallery.index import GalleryIndex
from service.settings import MIB, Settings
from service.telemetry.metrics import Metrics

log = logging.getLogger("service.gallery")
BATCH_SIZE = 32
PRUNE_INTERVAL_S = 60.0
PRUNE_FRACTION = 0.05  # prune whenever this fraction of the size limit is new


@dataclass(frozen=True, eq=False)
class _Job:
    bundle: Bundle
    prediction: ServedPrediction

    @property
    def size(self) -> int:
        return len(self.prediction.data)


class PredictionRecorder:
    """Save predictions if SAVE_PREDICTIONS is set. Images that wait for the database are limited by SAVE_QUEUE_MB."""

    def __init__(self, gallery: GalleryIndex, settings: Settings, metrics: Metrics) -> None:
        self._gallery = gallery
        self._settings = settings
        self._metrics = metrics
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def record(self, bundle: Bundle, data: bytes, probabilities: NDArray[np.float32], ood_score: float | None = None) -> None:
        """Queue an image and its prediction without waiting. It is dropped and counted if the queue is full."""
        with self._lock:
            is_full = self._queued_bytes + len(data) > self._settings.save_queue_mb * MIB
            if not is_full:
                self._queued_bytes += len(data)
        if is_full:
            self._metrics.saved_predictions.labels("dropped").inc()
            return
        sha256 = hashlib.sha256(data).hexdigest()
        unlike = bundle.decision_rule.is_in_distribution(ood_score) is False
        now = datetime.now(timezone.utc)
        self._jobs.put(_Job(bundle, ServedPrediction(data, sha256, probabilities, now, ood_score, unlike)))

    def page_url(self, version: str, data: bytes) -> str:
        """Return the address of the page of an image that the model of this version predicted."""
        sha256 = hashlib.sha256(data).hexdigest()
        return url_for("photo.page", model=version, photo=production_name(sha256), sha256=sha256)

    def close(self, timeout_s: float = 10.0) -> None:
        """Save what is queued, and end the thread."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pruned_at, added_bytes, is_last = -PRUNE_INTERVAL_S, 0, False
        max_bytes = int(self._settings.max_saved_mb * MIB)
        while not is_last:
            jobs, is_last = self._take()
            size = sum(job.size for job in jobs)
            outcomes = self._save(jobs)
            with self._lock:
                self._queued_bytes -= size
            for outcome, images in outcomes.items():
                self._metrics.saved_predictions.labels(outcome).inc(images)
            added_bytes += size
            if time.monotonic() - pruned_at >= PRUNE_INTERVAL_S or added_bytes > PRUNE_FRACTION * max_bytes:
                pruned_at, added_bytes = time.monotonic(), 0
                self._prune(max_bytes)

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for queued jobs, at most BATCH_SIZE. Returns them and whether the recorder is closed."""
        jobs: list[_Job] = []
        with contextlib.suppress(queue.Empty):
            while len(jobs) < BATCH_SIZE:
                job = self._jobs.get(block=not jobs, timeout=PRUNE_INTERVAL_S)
                if job is None:
                    return jobs, True
                jobs.append(job)
        return jobs, False

    def _save(self, jobs: Sequence[_Job]) -> Counter[str]:
        """Save predictions and count them by outcome. After a failure, saving may work again for the next ones."""
        outcomes: Counter[str] = Counter()
        try:
            for version in dict.fromkeys(job.bundle.version for job in jobs):
                own = [job for job in jobs if job.bundle.version == version]
                bundle = own[0].bundle
                with self._gallery.database.write(background=True) as connection:
                    model_id = get_or_create_model(connection, version=version, name=bundle.name, classes=bundle.classes)
                    new = save_predictions(connection, model_id, bundle.classes, [job.prediction for job in own])
                outcomes.update(saved=new, duplicate=len(own) - new)
        except Exception as error:
            outcomes["dropped"] = len(jobs) - outcomes.total()
            log.warning("predictions were not saved: %s", error, exc_info=not isinstance(error, UserError))
        return outcomes

    def _prune(self, max_bytes: int) -> None:
        settings = self._settings
        try:
            with self._gallery.database.write(background=True) as connection:
                prune(connection, max_images=settings.max_saved, max_bytes=max_bytes, days=settings.retention_days)
        except Exception as error:
            log.warning("saved images were not pruned: %s", error, exc_info=not isinstance(error, UserError))
