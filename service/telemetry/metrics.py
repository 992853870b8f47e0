"""Metrics for Prometheus. The dashboard and the operator's guide use the same names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from service.telemetry.metrics_dir import DIR_VARIABLE

DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STAGES = ("decode_queue", "decode", "batch_queue", "inference")


class AllWorkers(MultiProcessCollector):
    """Collect the files of all workers, except empty ones.

    A worker creates each file empty before it sets the size, and prometheus_client cannot read it in between.
    """

    def collect(self) -> Iterable[Metric]:
        paths = glob.glob(os.path.join(glob.escape(self._path), "*.db"))
        metrics: Iterable[Metric] = self.merge([path for path in paths if not _is_empty(path)])  # type: ignore[no-untyped-call]
        return metrics


def _is_empty(path: str) -> bool:
    try:
        return os.path.getsize(path) == 0
    except FileNotFoundError:  # the gauges of a worker that has ended just now
        return True


@dataclass
class Metrics:
    """The metrics of an application. Under gunicorn each worker writes its own files, and ``render`` adds them up."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        r = self.registry
        self.requests = Counter(
            "http_requests_total", "Requests by route, method and status.", ["route", "method", "status"], registry=r
        )
        self.request_duration = Histogram(
            "http_request_duration_seconds",
            "Seconds from the arrival of a request to its response.",
            ["route"],
            buckets=DURATION_BUCKETS,
            registry=r,
        )
        self.errors = Counter("http_problems_total", "Errors by code, including those of single images.", ["code"], registry=r)
        self.connections = Gauge(
            "http_connections", "Open connections, updated every second.", registry=r, multiprocess_mode="livesum"
        )
        self.connections_cut = Counter(
            "http_connections_cut_total",
            "Connections closed because of the client (first_byte_timeout, head_timeout, body_timeout, send_timeout) or of a"
            " limit (connection_limit, buffer_limit), or not accepted for a moment (file_limit).",
            ["reason"],
            registry=r,
        )
        self.requests_rejected = Counter(
            "http_requests_rejected_total",
            "Requests rejected before the application: at_capacity, page_queue_full, image_queue_full, probe_queue_full,"
            " invalid_head.",
            ["reason"],
            registry=r,
        )
        self.stage_duration = Histogram(
            "classifier_stage_duration_seconds",
            "Seconds of an image in a stage: decode_queue, decode, batch_queue and inference (of its complete batch).",
            ["stage"],
            buckets=DURATION_BUCKETS,
            registry=r,
        )
        self.stages = {name: self.stage_duration.labels(name) for name in STAGES}
        self.batch_size = Histogram(
            "classifier_batch_size", "Images per inference.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )
        self.in_flight = Gauge(
            "classifier_in_flight_images", "Images waiting, decoding or in inference.", registry=r, multiprocess_mode="livesum"
        )
        self.predictions = Counter(
            "classifier_predictions_total", "Classified images by predicted label.", ["label"], registry=r
        )
        self.abstentions = Counter(
            "classifier_abstentions_total",
            "Classified images without a label, by reason: unlike_training or low_probability.",
            ["reason"],
            registry=r,
        )
        self.confidence = Histogram(
            "classifier_prediction_confidence",
            "Highest probability of each image.",
            buckets=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0),
            registry=r,
        )
        self.saved_predictions = Counter(
            "classifier_saved_predictions_total",
            "Classified images offered to the gallery: saved, duplicate or dropped.",
            ["outcome"],
            registry=r,
        )
        self.images_rejected = Counter(
            "classifier_images_rejected_total",
            "Images rejected for the cost of decoding them, by reason: pixels, jpeg_scans, segments, timeout, memory, ...",
            ["reason"],
            registry=r,
        )
        self.isolated_decodes = Counter(
            "classifier_isolated_decodes_total",
            "Images decoded in the decoder process: ok, rejected, timeout, crash or cut (by the request's deadline).",
            ["outcome"],
            registry=r,
        )
        self.ready = Gauge(
            "classifier_ready_workers", "Workers with a model that is ready.", registry=r, multiprocess_mode="livesum"
        )
        self.model_info = Gauge(
            "classifier_model_info",
            "1 for each name, version and precision that a worker serves, 0 once none does.",
            ["name", "version", "precision"],
            registry=r,
            multiprocess_mode="livemax",
        )
        self.rollouts = Counter(
            "classifier_rollouts_total",
            "Bundles by outcome: activated, rolled_back, synced (by the other workers), rejected or failed (to sync).",
            ["outcome"],
            registry=r,
        )

    def render(self) -> bytes:
        """Return the metrics of all workers in Prometheus's text format.

        If something removed the workers' files, those of this worker alone.
        """
        folder = os.environ.get(DIR_VARIABLE)
        if folder is None or not glob.glob(os.path.join(glob.escape(folder), f"*_{os.getpid()}.db")):
            return generate_latest(self.registry)
        all_workers = CollectorRegistry()
        AllWorkers(all_workers)  # type: ignore[no-untyped-call]
        return generate_latest(all_workers)
