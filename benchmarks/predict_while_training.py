"""Measure the throughput and the latency of /predict before, during and after a training run of the studio.

    python -m benchmarks.predict_while_training DATA [--backbone efficientnet_lite0] [--seconds 15] [--limit 280]

Starts the service with the included classifier and the studio. A client posts the photos of DATA over --connections
connections without a pause, and meanwhile the API trains on DATA with an empty feature cache. Each step of the run is measured
separately. The run is then repeated without requests, to measure how much they slow it down.

The baseline is the mean of the throughput before and after the run, because the speed of a machine drifts. The exit code is 1
if a step keeps less than half of it, if a 99th percentile reaches one second, or if the run does not finish. Settings of the
service, such as STUDIO_NICENESS, are taken from the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.serve_speed import encode_request, read_photos, run_service, stream_responses
from models.runtime.processor import instruction_sets, processor_name
from service.settings import SHIPPED_BUNDLE
from service.studio.job_progress import JobProgress

WARM_UP_S = 3.0
MIN_STEP_S = 1.0  # shorter steps are measured together
MIN_RATIO = 0.5
MAX_P99_MS = 1000.0
POLL_S = 0.5
SHORT_STEPS = f"Steps of less than {MIN_STEP_S:g} s"
Timed = tuple[float, float]  # when a response was received, and its time in milliseconds


@dataclass(frozen=True)
class Period:
    """A time in which requests were measured."""

    name: str
    seconds: float
    times_ms: list[float]

    @property
    def rate(self) -> float:
        return len(self.times_ms) / self.seconds

    def percentile_ms(self, fraction: float) -> float:
        ordered = sorted(self.times_ms)
        return ordered[int(len(ordered) * fraction)] if ordered else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of photos to train on")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="time before and after the run")
    parser.add_argument("--limit", type=float, default=280.0, help="seconds after which the run is canceled")
    args = parser.parse_args()
    photos = read_photos(parser, args.data)
    with tempfile.TemporaryDirectory(prefix="predict-while-training-") as folder:
        root = Path(folder)
        settings = {
            "STUDIO": "1",
            "STUDIO_DIR": str(root / "studio"),
            "DATA_DIR": str(args.data.resolve()),
            "DATABASE_URL": f"sqlite:///{root / 'reviews.db'}",
            "XDG_CACHE_HOME": str(root / "cache"),  # of the features
        }
        with run_service(SHIPPED_BUNDLE, **settings) as port:
            client = StudioClient(f"http://127.0.0.1:{port}/studio", args.backbone)
            with requests_to(port, [encode_request(photo) for photo in photos], args.connections) as responses:
                time.sleep(WARM_UP_S)
                before_at = time.time()
                time.sleep(args.seconds)
                job = client.train("under-load", limit_s=args.limit)
                after_at = time.time()
                time.sleep(args.seconds)
                until = time.time()
            steps = read_steps(root / "studio" / "jobs" / str(job["id"]) / "progress.jsonl", job, until=after_at)
            before = period("Before", responses, [(before_at, before_at + args.seconds)])
            after = period("After", responses, [(after_at, until)])
            during = [period(name, responses, times) for name, times in steps.items()]
            total = period("The complete run", responses, [times for rows in steps.values() for times in rows])
            is_good = print_table([before, *during, total, after], baseline=(before.rate + after.rate) / 2)
            print(f"\nThe run {job['state']} under load: {duration_s(job):.0f} s", flush=True)
            if job["state"] == "finished":
                shutil.rmtree(root / "cache")
                print(f"The run without requests: {duration_s(client.train('alone', limit_s=args.limit)):.0f} s")
    print(f"{processor_name()}: {', '.join(instruction_sets()) or 'unknown instruction sets'}")
    return int(not is_good or job["state"] != "finished")


class StudioClient:
    """Starts runs with the API of the studio.

    Args:
        url: Address of the studio.
        backbone: The network to train.
    """

    def __init__(self, url: str, backbone: str) -> None:
        self._url, self._backbone = url, backbone

    def train(self, name: str, *, limit_s: float) -> dict[str, Any]:
        """Train on DATA_DIR, and return the state of the run once it has ended. Cancel it after ``limit_s``."""
        id_ = self._send("/jobs", {"name": name, "data": "folder:", "backbone": self._backbone})["id"]
        deadline = time.monotonic() + limit_s
        while (job := self._send(f"/jobs/{id_}"))["ended_at"] is None:
            if time.monotonic() > deadline:
                self._send(f"/jobs/{id_}/cancel", {})
                deadline = float("inf")
            time.sleep(POLL_S)
        return job

    def _send(self, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.load(response))


@contextlib.contextmanager
def requests_to(port: int, requests: list[bytes], connections: int) -> Iterator[list[Timed]]:
    """Send requests in a thread until the block ends. Yields the responses, whose times are those of ``time.time``."""
    responses: list[Timed] = []
    ended = threading.Event()
    offset_s = time.time() - time.perf_counter()

    def send() -> None:
        with contextlib.closing(stream_responses(port, requests, connections)) as stream:
            for response in stream:
                responses.append((response.at + offset_s, response.time_ms))
                if ended.is_set():
                    return

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        try:
            yield responses
        finally:
            ended.set()
        sending.result()  # raises the error of the thread


def read_steps(progress: Path, job: dict[str, Any], *, until: float) -> dict[str, list[tuple[float, float]]]:
    """Return the times of each step of a run, in order. The steps before the first event are those of its start."""
    marks = [("Starting the process", datetime.fromisoformat(job["started_at"]).timestamp())]
    state = JobProgress()
    for line in progress.read_text(encoding="utf-8").splitlines():
        if line:
            state.add(event := json.loads(line))
            if state.step != marks[-1][0]:
                marks.append((state.step, float(event["time"])))
    ends = [*(at for _, at in marks[1:]), until]
    steps: dict[str, list[tuple[float, float]]] = {}
    for (name, begin), end in zip(marks, ends, strict=True):
        if end > begin:
            steps.setdefault(name if end - begin >= MIN_STEP_S else SHORT_STEPS, []).append((begin, end))
    return steps


def period(name: str, responses: list[Timed], times: list[tuple[float, float]]) -> Period:
    """Select the responses that were received in one of ``times``, as (begin, end)."""
    selected = [time_ms for at, time_ms in responses if any(begin <= at < end for begin, end in times)]
    return Period(name, sum(end - begin for begin, end in times), selected)


def print_table(periods: list[Period], *, baseline: float) -> bool:
    """Print the periods, and return whether each of them keeps the limits."""
    width = max(len(row.name) for row in periods)
    print(f"{'':<{width}}  seconds  photos/s  ratio  p50 ms  p99 ms")
    for row in periods:
        times = f"{row.percentile_ms(0.5):6.0f}  {row.percentile_ms(0.99):6.0f}"
        print(f"{row.name:<{width}}  {row.seconds:7.1f}  {row.rate:8.1f}  {row.rate / baseline:5.2f}  {times}")
    return all(row.rate >= MIN_RATIO * baseline and row.percentile_ms(0.99) < MAX_P99_MS for row in periods)


def duration_s(job: dict[str, Any]) -> float:
    started, ended = (datetime.fromisoformat(job[name]) for name in ("started_at", "ended_at"))
    return (ended - started).total_seconds()


if __name__ == "__main__":
    sys.exit(main())
