"""Rollouts under gunicorn: under load, with several workers, with a killed worker, and many in a row."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SharedFolder
from tests.helpers.rollout_bundles import Bundles, make_bundles
from tests.helpers.server import RESPONSE_TIMEOUT_S, Server, poll, rss_mb, serve

pytestmark = pytest.mark.slow

KEY = {"X-API-Key": "sesame"}
CLIENTS = 4
ROLLOUTS = 8
MIN_REQUESTS = 1000  # during the rollouts


@pytest.fixture(scope="module")
def bundles(shared_folder: SharedFolder) -> Bundles:
    return Bundles(shared_folder("rollout-bundles", make_bundles))


def activate(server: Server, name: str) -> dict[str, Any]:
    reply = server.post(json.dumps({"bundle": name}).encode(), "application/json", path="/admin/bundle", headers=KEY)
    assert reply.status == 200, reply.body
    return dict(reply.json())


def status(server: Server) -> dict[str, Any]:
    return dict(server.get("/admin/bundle", headers=KEY).json())


def has_converged(server: Server, version: str) -> bool:
    state = status(server)
    return state["converged"] and state["active"]["version"] == version


class Load:
    """Clients that send requests without a pause, each on its own connection, and count the predictions by version."""

    def __init__(self, server: Server, photo: bytes) -> None:
        self._server, self._photo = server, photo
        self._stop = threading.Event()
        self.failed: list[object] = []
        self.predictions: Counter[tuple[str, tuple[float, ...]]] = Counter()
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return sum(self.predictions.values())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._send) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                self._stop.set()
            for client in clients:
                client.result()

    def _send(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=RESPONSE_TIMEOUT_S)
        while not self._stop.is_set():
            connection.request("POST", "/predict", self._photo, {"Content-Type": "image/jpeg"})
            reply = connection.getresponse()
            body = reply.read()
            with self._lock:
                if reply.status != 200:
                    self.failed.append((reply.status, body))
                    continue
                document = json.loads(body)
                values = tuple(round(value, 4) for value in document["predictions"][0]["probabilities"].values())
                self.predictions[document["model"]["version"], values] += 1
        connection.close()


def test_no_request_fails_during_rollouts(bundles: Bundles) -> None:
    photo, expected = bundles.photo(), {}
    with serve(bundles.path("one"), admin_keys="sesame", precision="fp32") as server:
        for name in ("two", "one"):
            activate(server, name)
            row = server.post(photo).json()["predictions"][0]
            expected[bundles.version(name)] = list(row["probabilities"].values())
        load = Load(server, photo)
        with load.running():
            for number, name in enumerate(itertools.cycle(("two", "one")), 1):
                before = load.total
                activate(server, name)
                poll(lambda before=before: load.failed or load.total > before + MIN_REQUESTS // ROLLOUTS)  # type: ignore[misc]
                if number == 2:  # a rejected bundle changes nothing under load either
                    for broken in ("changed", "wrong-golden", "fewer", "nothing"):
                        body = json.dumps({"bundle": broken}).encode()
                        reply = server.post(body, "application/json", path="/admin/bundle", headers=KEY)
                        assert reply.status in (409, 422), reply.body
                        assert status(server)["active"]["version"] == bundles.version(name)
                if number >= ROLLOUTS and load.total >= MIN_REQUESTS:
                    break
        assert load.failed == []
        assert load.total >= MIN_REQUESTS
        assert {version for version, _ in load.predictions} == set(expected)
        for version, values in load.predictions:
            assert list(values) == pytest.approx(expected[version], abs=1e-3)
        assert server.metrics()['http_requests_total{method="POST",route="/predict",status="200"}'] == load.total + 2
        assert [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")] == []


def test_all_workers_converge_and_so_does_a_replacement(bundles: Bundles) -> None:
    two, one = bundles.version("two"), bundles.version("one")
    with serve(bundles.path("one"), admin_keys="sesame", web_concurrency=2) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        assert has_converged(server, one)
        load = Load(server, bundles.photo())
        with load.running():
            activate(server, "two")
            poll(lambda: has_converged(server, two))
        assert load.failed == []
        assert {row["pid"] for row in status(server)["workers"]} == set(server.workers())
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        poll(lambda: len(server.workers()) == 2 and victim not in server.workers())
        poll(lambda: len(status(server)["workers"]) == 2 and has_converged(server, two))
        versions = {server.post(bundles.photo()).json()["model"]["version"] for _ in range(20)}
        assert versions == {two}
        assert server.request("POST", "/admin/rollback", headers=KEY).status == 200
        poll(lambda: has_converged(server, one))
        outcomes = {name: value for name, value in server.metrics().items() if name.startswith("classifier_rollouts_total")}
        assert outcomes['classifier_rollouts_total{outcome="activated"}'] == 1
        assert outcomes['classifier_rollouts_total{outcome="rolled_back"}'] == 1
        assert outcomes['classifier_rollouts_total{outcome="synced"}'] == 2
        assert 'classifier_rollouts_total{outcome="failed"}' not in outcomes


def test_a_rollout_and_the_metrics_survive_a_cleaner_of_temporary_files(bundles: Bundles) -> None:
    two = bundles.version("two")
    with serve(bundles.path("one"), admin_keys="sesame", web_concurrency=2) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        activate(server, "two")
        poll(lambda: has_converged(server, two))
        for path in (*server.log_file.parent.glob("dogs-vs-cats-*"), metrics_dir(server)):
            shutil.rmtree(path)
        assert server.get("/metrics").status == 200
        assert server.get("/health/ready").status == 200
        assert has_converged(server, two)
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        poll(lambda: len(status(server)["workers"]) == 2 and victim not in server.workers())
        assert has_converged(server, two)
        assert {server.post(bundles.photo()).json()["model"]["version"] for _ in range(20)} == {two}
        assert server.get("/metrics").status == 200


def metrics_dir(server: Server) -> str:
    """Return the folder of the workers' metrics, in which a worker has open files."""
    maps = Path(f"/proc/{server.workers()[0]}/maps").read_text()
    return next(word.rpartition("/")[0] for word in maps.split() if "dogs-vs-cats-metrics-" in word)


def test_a_changed_link_is_followed_by_all_workers_and_checked_once(bundles: Bundles, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundles.path("one"))

    def point_to(name: str) -> None:
        new = tmp_path / "new"
        new.symlink_to(bundles.path(name))
        new.replace(link)

    with serve(link, admin_keys="sesame", web_concurrency=2, bundle_poll_s=0.1) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        point_to("changed")
        poll(lambda: "changed or damaged" in (status(server)["last_rejection"] or {}).get("reason", ""))
        point_to("two")
        poll(lambda: has_converged(server, bundles.version("two")))
        metrics = server.metrics()
        assert metrics['classifier_rollouts_total{outcome="rejected"}'] == 1
        assert metrics['classifier_rollouts_total{outcome="activated"}'] == 1
        assert status(server)["survives_restart"]


def test_rollouts_do_not_leak_memory_or_threads(bundles: Bundles) -> None:
    with serve(bundles.path("one"), admin_keys="sesame") as server:
        (worker,) = server.workers()
        names = itertools.cycle(("two", "one"))

        def roll_out(times: int) -> None:
            for _ in range(times):
                assert server.post(bundles.photo()).status == 200
                activate(server, next(names))

        roll_out(8)
        threads = len(list(Path(f"/proc/{worker}/task").iterdir()))
        before_mb = rss_mb(worker)
        roll_out(12)
        poll(lambda: rss_mb(worker) - before_mb < 12)
        poll(lambda: len(list(Path(f"/proc/{worker}/task").iterdir())) <= threads + 2)
