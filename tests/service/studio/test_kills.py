"""The loop over HTTP while the service, the trainings and the database are killed at random moments.

Nothing that was acknowledged may be lost, trainings resume, and the live model keeps answering. ``KILL_SEED=n`` selects other
moments.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.databases import Postgres, run_postgres
from tests.helpers.server import Server, poll
from tests.helpers.studio_server import KEY, TRAINING_S, Studio

pytestmark = pytest.mark.heavy

KILLS = 10
MAX_DOWN_S = 1.0  # of a killed database
WORKERS = 2
PROBE_EVERY_S = 0.1


@dataclass
class Loop:
    """A client that repeats each request until it is acknowledged, and then expects its effect to last."""

    studio: Studio
    photos: dict[str, bytes]
    live: str
    uploaded: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def steps(self) -> Iterator[tuple[Callable[[], None], float]]:
        """Yield the steps of the loop, with the seconds within which each may be disturbed."""
        yield self.create, 0.5
        names = list(self.photos)
        for third in (names[::3], names[1::3], names[2::3]):
            yield partial(self.upload, third), 0.5
        yield self.audit, 3.0
        yield partial(self.submit, "first"), 0.5
        yield partial(self.wait_for, "first"), 10.0
        yield partial(self.relabel, "first"), 0.5
        yield partial(self.submit, "second"), 0.5
        yield partial(self.wait_for, "second"), 10.0
        yield partial(self.put_live, "second"), 1.0
        yield self.roll_back, 1.0
        yield partial(self.put_live, "first"), 1.0

    def create(self) -> None:
        assert self.studio.post("datasets", name="pets").status in (201, 409)  # 409: created, but not acknowledged

    def upload(self, names: list[str]) -> None:
        for name in names:
            path = f"/studio/datasets/pets/photos/{name}"
            assert self.studio.request("PUT", path, self.photos[name], headers=KEY).status in (200, 201)
            self.uploaded[name] = self.photos[name]

    def audit(self) -> None:
        """Audit the photos, again if the audit was interrupted."""

        def is_done() -> bool:
            task = self.studio.get("/studio/datasets/pets/audit.json").json()["task"]
            if task is None or task["state"] == "interrupted":
                assert self.studio.post("datasets/pets/audit").status == 202
            elif task["state"] != "running":
                assert task["state"] == "done", task
                return True
            return False

        poll(is_done, within_s=TRAINING_S, every_s=0.2)

    def submit(self, run: str) -> None:
        fields = {"data": "dataset:pets", "backbone": "efficientnet_lite0", "epochs": "200", "name": run}
        response = self.studio.post("jobs", **fields, reviews="1" if self.labels else "0")
        assert response.status == 201 or "There is already" in response.json()["detail"], response.body
        (self.jobs[run],) = [job["id"] for job in self.all_jobs() if job["run"] == run]

    def wait_for(self, run: str) -> None:
        """Wait until a training has finished. If it gave up after several interruptions, it says so, and is resumed."""
        id_ = self.jobs[run]

        def has_finished() -> bool:
            job = self.studio.job(id_)
            if job["state"] == "failed":
                assert "was interrupted 5 times and was not resumed again" in job["reason"], job
                assert self.studio.post(f"jobs/{id_}/resume").status in (200, 409)
            return bool(job["state"] == "finished")

        poll(has_finished, within_s=TRAINING_S, every_s=0.2)
        self.versions[run] = self.studio.job(id_)["version"]

    def relabel(self, run: str) -> None:
        """Relabel half of the photos of the gallery."""
        rows = self.predictions(run)
        for row in rows[::2]:
            label = next(name for name in row["probabilities"] if name != row["label"])
            photo = {"photo": row["photo"], "sha256": row["sha256"]}
            body = {"decision": "label", "new_label": label, "photos": [photo], "model": self.versions[run]}
            headers = {"Content-Type": "application/json", **KEY}
            response = self.studio.request("POST", "/gallery/reviews", json.dumps(body).encode(), headers=headers)
            assert response.status == 200, response.body
            self.labels[row["photo"]] = label

    def put_live(self, run: str) -> None:
        version = self.versions[run]
        poll(lambda: self.studio.post(f"runs/{run}/live", allow=["classes", "disagreement"]).status == 200)
        self.live = version

    def roll_back(self) -> None:
        before = self.live
        response = self.studio.post("runs/rollback", expected_version=before)
        assert response.status in (200, 409), response.body  # 409: rolled back, but not acknowledged
        self.live = self.studio.get("/admin/bundle", **KEY).json()["active"]["version"]
        assert self.live != before

    def predictions(self, run: str) -> list[dict[str, Any]]:
        return list(self.studio.get(f"/gallery/photos.json?model={self.versions[run]}").json()["rows"])

    def all_jobs(self) -> list[dict[str, Any]]:
        return list(self.studio.get("/studio/jobs").json()["jobs"])

    def check(self) -> None:
        """Check that everything that was acknowledged is there."""
        listing = self.studio.get("/studio/datasets/pets/files.json").json()["files"]
        assert {row["photo"] for rows in listing.values() for row in rows} >= self.uploaded.keys()
        folder = self.studio.folder / "studio" / "datasets" / "pets"
        assert {name: (folder / name).read_bytes() for name in self.uploaded} == self.uploaded
        jobs = {job["run"]: job for job in self.all_jobs()}
        assert {run: jobs[run]["id"] for run in self.jobs} == self.jobs
        assert {run: jobs[run]["version"] for run in self.versions} == self.versions
        for run in self.versions:
            decisions = {row["photo"]: row["decision"] for row in self.predictions(run)}
            assert {photo: decisions[photo]["new_label"] for photo in self.labels} == self.labels
        poll(lambda: self.studio.get("/admin/bundle", **KEY).json()["converged"])
        photo = self.photos[min(self.photos)]
        assert {predict(self.studio.server, photo) for _ in range(4)} == {(200, self.live)}


class Prober:
    """Sends a photo to /predict again and again. ``down`` are the times in which the service was killed and restarted."""

    def __init__(self, studio: Studio, photo: bytes) -> None:
        self.down: list[tuple[float, float]] = []
        self._studio, self._photo = studio, photo
        self._failed: list[tuple[float, float, str]] = []
        self._answered: list[float] = []
        self._closed = threading.Event()

    def run(self) -> None:
        while not self._closed.wait(PROBE_EVERY_S):
            began = time.monotonic()
            try:
                status, _ = predict(self._studio.server, self._photo)
                problem = f"status {status}"
            except (OSError, http.client.HTTPException) as error:
                status, problem = 0, repr(error)
            if status == 200:
                self._answered.append(began)
            else:
                self._failed.append((began, time.monotonic(), problem))

    def close(self) -> None:
        self._closed.set()

    def check(self) -> None:
        """Check that every request was answered that did not overlap with a kill of the service."""
        gaps = [row for row in self._failed if not any(row[0] < end and begin < row[1] for begin, end in self.down)]
        assert gaps == []
        assert self._answered


class Killer:
    """Kills one of ``targets``, and restarts what does not restart automatically."""

    def __init__(self, studio: Studio, prober: Prober, postgres: Postgres, rng: random.Random) -> None:
        self._studio, self._prober, self._postgres, self._rng = studio, prober, postgres, rng
        self.targets = {"service": self._service, "master": self._master, "training": self._training}
        self.targets |= {"runner": self._runner, "database": self._database}

    def kill(self, delay_s: float, target: str) -> None:
        time.sleep(delay_s)
        self.targets[target]()

    def _service(self) -> None:
        """Kill gunicorn with its workers."""
        began = time.monotonic()
        os.killpg(self._studio.server.pid, signal.SIGKILL)
        self._restart(began)

    def _master(self) -> None:
        self._restart(time.monotonic())

    def _restart(self, began: float) -> None:
        self._studio.restart(signal.SIGKILL)
        wait_for_workers(self._studio)
        self._prober.down.append((began, time.monotonic()))

    def _training(self) -> None:
        """Kill the process of the training if it has started, else the one that starts it."""
        self._kill("/studio/runs/", "service.studio.job_runner")

    def _runner(self) -> None:
        self._kill("service.studio.job_runner")

    def _kill(self, *words: str) -> None:
        """Kill the processes whose command lines contain the first of ``words`` that any contains."""
        for pid in poll(lambda: next(filter(None, map(self._studio.processes, words)), None)) or ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _database(self) -> None:
        self._postgres.kill()
        time.sleep(self._rng.uniform(0, MAX_DOWN_S))
        self._postgres.start()


def wait_for_workers(studio: Studio) -> None:
    """Wait until every worker has loaded its model, and not only the first one."""
    poll(lambda: len(studio.get("/admin/bundle", **KEY).json()["workers"]) == WORKERS)


def predict(server: Server, photo: bytes) -> tuple[int, str]:
    """Return the status of a prediction, and the version of the model."""
    response = server.post(photo)
    return response.status, response.json()["model"]["version"] if response.status == 200 else ""


def test_nothing_acknowledged_is_lost(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", "0"))
    rng = random.Random(seed)
    files = sorted((tiny_bundle.data / "train").glob("*/*"))
    photos = {str(file.relative_to(tiny_bundle.data / "train")): file.read_bytes() for file in files}
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(run_postgres())
        url = postgres.create()
        studio = Studio(tiny_bundle.path, tmp_path, tiny_bundle.data, database_url=url, web_concurrency=WORKERS)
        stack.callback(studio.close)
        wait_for_workers(studio)
        photo = photos[min(photos)]
        prober = Prober(studio, photo)
        killer = Killer(studio, prober, postgres, rng)
        loop = Loop(studio, photos, live=predict(studio.server, photo)[1])
        threads = stack.enter_context(ThreadPoolExecutor())
        probing = threads.submit(prober.run)
        stack.callback(prober.close)
        steps = list(loop.steps())
        targets = [target for target in killer.targets for _ in range(KILLS // len(killer.targets))]
        kills = sorted((rng.randrange(len(steps)), rng.random(), target) for target in targets)
        for number, (step, max_delay_s) in enumerate(steps):
            own = [(rng.uniform(0, max_delay_s), target) for index, _, target in kills if index == number]
            print(f"seed {seed}, step {number}: {own}", flush=True)
            doing = threads.submit(step)
            for delay_s, target in own:
                killer.kill(delay_s, target)
            doing.result()
            if own:
                loop.check()
        prober.close()
        probing.result()
        prober.check()
