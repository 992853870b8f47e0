"""Swaps under gunicorn: under load, with several workers, with a worker that dies, and over and over."""

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

from tests.helpers.rollout_bundles import Bundles, make_bundles
from tests.helpers.server import ANSWER_S, Server, poll, rss_mb, serve

KEY = {"X-API-Key": "sesame"}
CLIENTS = 4
SWAPS = 8
LEAST = 1000  # requests while it swaps


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return make_bundles(tmp_path_factory.mktemp("swap-server"))


def choose(server: Server, name: str) -> dict[str, Any]:
    reply = server.post(json.dumps({"bundle": name}).encode(), "application/json", path="/admin/bundle", headers=KEY)
    assert reply.status == 200, reply.body
    return dict(reply.json())


def status(server: Server) -> dict[str, Any]:
    return dict(server.get("/admin/bundle", headers=KEY).json())


def settled(server: Server, version: str) -> bool:
    said = status(server)
    return said["converged"] and said["active"]["version"] == version


class Load:
    """Clients that ask without a pause, each on a connection of its own; what they were answered, by version."""

    def __init__(self, server: Server, photo: bytes) -> None:
        self._server, self._photo = server, photo
        self._stop = threading.Event()
        self.failed: list[object] = []
        self.answers: Counter[tuple[str, tuple[float, ...]]] = Counter()
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return sum(self.answers.values())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._ask) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                self._stop.set()
            for client in clients:
                client.result()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=ANSWER_S)
        while not self._stop.is_set():
            connection.request("POST", "/predict", self._photo, {"Content-Type": "image/jpeg"})
            reply = connection.getresponse()
            body = reply.read()
            with self._lock:
                if reply.status != 200:
                    self.failed.append((reply.status, body))
                    continue
                answer = json.loads(body)
                values = tuple(round(value, 4) for value in answer["predictions"][0]["probabilities"].values())
                self.answers[answer["model"]["version"], values] += 1
        connection.close()


def test_no_request_fails_while_bundles_change_back_and_forth(bundles: Bundles) -> None:
    photo, wanted = bundles.photo(), {}
    with serve(bundles.path("one"), admin_keys="sesame", precision="fp32") as server:
        for name in ("two", "one"):
            choose(server, name)
            row = server.post(photo).json()["predictions"][0]
            wanted[bundles.version(name)] = list(row["probabilities"].values())
        load = Load(server, photo)
        with load.running():
            for number, name in enumerate(itertools.cycle(("two", "one")), 1):
                before = load.total
                choose(server, name)
                poll(lambda before=before: load.failed or load.total > before + LEAST // SWAPS)  # type: ignore[misc]
                if number == 2:  # what is refused changes nothing, even now
                    for broken in ("changed", "wrong-golden", "fewer", "nothing"):
                        body = json.dumps({"bundle": broken}).encode()
                        reply = server.post(body, "application/json", path="/admin/bundle", headers=KEY)
                        assert reply.status in (409, 422), reply.body
                        assert status(server)["active"]["version"] == bundles.version(name)
                if number >= SWAPS and load.total >= LEAST:
                    break
        assert load.failed == []
        assert load.total >= LEAST
        assert {version for version, _ in load.answers} == set(wanted)
        for version, values in load.answers:
            assert list(values) == pytest.approx(wanted[version], abs=1e-3)
        assert server.metrics()['http_requests_total{method="POST",route="/predict",status="200"}'] == load.total + 2
        assert [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")] == []


def test_all_workers_come_to_the_same_and_so_does_one_that_takes_a_dead_ones_place(bundles: Bundles) -> None:
    two, one = bundles.version("two"), bundles.version("one")
    with serve(bundles.path("one"), admin_keys="sesame", web_concurrency=2) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        assert settled(server, one)
        load = Load(server, bundles.photo())
        with load.running():
            choose(server, "two")
            poll(lambda: settled(server, two))
        assert load.failed == []
        assert {row["pid"] for row in status(server)["workers"]} == set(server.workers())
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        poll(lambda: len(server.workers()) == 2 and victim not in server.workers())
        poll(lambda: len(status(server)["workers"]) == 2 and settled(server, two))
        seen = {server.post(bundles.photo()).json()["model"]["version"] for _ in range(20)}
        assert seen == {two}
        assert server.request("POST", "/admin/rollback", headers=KEY).status == 200
        poll(lambda: settled(server, one))
        outcomes = {name: value for name, value in server.metrics().items() if name.startswith("classifier_rollouts_total")}
        assert outcomes['classifier_rollouts_total{outcome="activated"}'] == 1
        assert outcomes['classifier_rollouts_total{outcome="rolled_back"}'] == 1
        assert outcomes['classifier_rollouts_total{outcome="synced"}'] == 2
        assert 'classifier_rollouts_total{outcome="failed"}' not in outcomes


def test_a_rollout_and_the_metrics_survive_a_cleaner_of_temporary_files(bundles: Bundles) -> None:
    two = bundles.version("two")
    with serve(bundles.path("one"), admin_keys="sesame", web_concurrency=2) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        choose(server, "two")
        poll(lambda: settled(server, two))
        for path in (*server.log_file.parent.glob("dogs-vs-cats-*"), metrics_dir(server)):
            shutil.rmtree(path)
        assert server.get("/metrics").status == 200
        assert server.get("/health/ready").status == 200
        assert settled(server, two)
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        poll(lambda: len(status(server)["workers"]) == 2 and victim not in server.workers())
        assert settled(server, two)
        assert {server.post(bundles.photo()).json()["model"]["version"] for _ in range(20)} == {two}
        assert server.get("/metrics").status == 200


def metrics_dir(server: Server) -> str:
    """The folder of the workers' metrics, which a worker has open."""
    maps = Path(f"/proc/{server.workers()[0]}/maps").read_text()
    return next(word.rpartition("/")[0] for word in maps.split() if "dogs-vs-cats-metrics-" in word)


def test_a_link_is_followed_by_all_workers_and_judged_once(bundles: Bundles, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundles.path("one"))

    def lead_to(name: str) -> None:
        new = tmp_path / "new"
        new.symlink_to(bundles.path(name))
        new.replace(link)

    with serve(link, admin_keys="sesame", web_concurrency=2, bundle_poll_s=0.1) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        lead_to("changed")
        poll(lambda: "changed or damaged" in (status(server)["last_rejection"] or {}).get("reason", ""))
        lead_to("two")
        poll(lambda: settled(server, bundles.version("two")))
        metrics = server.metrics()
        assert metrics['classifier_rollouts_total{outcome="rejected"}'] == 1
        assert metrics['classifier_rollouts_total{outcome="activated"}'] == 1
        assert status(server)["survives_restart"]


def test_memory_is_given_back(bundles: Bundles) -> None:
    with serve(bundles.path("one"), admin_keys="sesame") as server:
        (worker,) = server.workers()
        names = itertools.cycle(("two", "one"))

        def swap(times: int) -> None:
            for _ in range(times):
                assert server.post(bundles.photo()).status == 200
                choose(server, next(names))

        swap(8)
        threads = len(list(Path(f"/proc/{worker}/task").iterdir()))
        before_mb = rss_mb(worker)
        swap(12)
        poll(lambda: rss_mb(worker) - before_mb < 12)
        poll(lambda: len(list(Path(f"/proc/{worker}/task").iterdir())) <= threads + 2)
