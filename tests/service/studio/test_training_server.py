"""Trainings under gunicorn: start, follow, kill, cancel, resume, put live, restart and roll back over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import pytest

from tests.conftest import PhotoFolder
from tests.helpers.server import Response, Server, poll, serve

pytestmark = pytest.mark.slow

TRAINING_S = 600.0  # the machine may be busy
KEY = {"X-API-Key": "sesame"}


class Studio:
    """A service with the studio, which can be killed and started again with the same folders and database."""

    def __init__(self, bundle: Path, folder: Path, data: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self._settings = {
            "studio": 1,
            "studio_dir": folder / "studio",
            "database_url": f"sqlite:///{folder / 'reviews.db'}",
            "data_dir": data,
            "admin_keys": "ann:sesame",
            "studio_niceness": 0,
            "web_concurrency": 2,
            "first_byte_timeout_s": 300,
        }
        self._stack = contextlib.ExitStack()
        self.server = self._start()

    def _start(self) -> Server:
        return self._stack.enter_context(serve(self.bundle, **self._settings))

    def request(
        self, method: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a request again as long as the worker that receives it has not opened its database yet."""

        def send() -> Response | None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the machine may be busy with the resumed training
                response = self.server.request(method, path, body, headers=headers)
                return None if response.status == 503 else response
            return None

        return cast("Response", poll(send))

    def get(self, path: str, **headers: str) -> Response:
        return self.request("GET", path, headers=headers)

    def restart(self, by: signal.Signals) -> None:
        """End the service with a signal, wait until it has ended, and start it again."""
        os.kill(self.server.pid, by)
        self.server.process.wait(TRAINING_S)
        self._stack.close()
        self.server = self._start()

    def close(self) -> None:
        self._stack.close()

    def post(self, path: str, **fields: Any) -> Response:
        headers = {"Content-Type": "application/json", **KEY}
        return self.request("POST", f"/studio/{path}", json.dumps(fields).encode(), headers=headers)

    def submit(self, **fields: str) -> int:
        response = self.post("jobs", data="folder:", backbone="efficientnet_lite0", **fields)
        assert response.status == 201, response.body
        assert response.headers["Location"] == f"/studio/jobs/{response.json()['id']}"
        return int(response.json()["id"])

    def job(self, id_: int) -> dict[str, Any]:
        return dict(self.get(f"/studio/jobs/{id_}").json())

    def wait_for(self, id_: int, state: str) -> dict[str, Any]:
        def is_reached() -> bool:
            now = self.job(id_)
            assert now["state"] in (state, "queued", "running"), now
            return bool(now["state"] == state)

        poll(is_reached, within_s=TRAINING_S, every_s=0.2)
        return self.job(id_)

    def wait_for_epoch(self, id_: int, epoch: int) -> None:
        poll(lambda: self.job(id_)["progress"]["epoch"] >= epoch, within_s=TRAINING_S, every_s=0.2)

    def page(self, path: str) -> str:
        response = self.get(path, Accept="text/html")
        assert response.status == 200, response.body
        return response.body.decode()

    def predicted_by(self, photo: Path) -> str:
        response = self.request("POST", "/predict", photo.read_bytes(), headers={"Content-Type": "image/jpeg"})
        return str(response.json()["model"]["version"])

    def processes(self, word: str) -> list[int]:
        """Return the ids of the processes of this studio whose command line contains ``word``."""
        own = f"STUDIO_DIR={self.folder / 'studio'}\0".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if word.encode() in (process / "cmdline").read_bytes() and own in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def training_pid(self, run: str) -> int:
        return poll(lambda: self.processes(f"/runs/{run}\0"))[0]


@pytest.fixture(scope="module")
def studio(
    tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, photo_folder: PhotoFolder
) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("training")
    made = Studio(tiny_bundle.path, folder, photo_folder(folder / "data", train=12, valid=6))
    yield made
    made.close()


@pytest.fixture(scope="module")
def finished(studio: Studio) -> dict[str, Any]:
    """A training of two epochs that was followed by its events until its end."""
    id_ = studio.submit(epochs="2", name="first")
    states = list(follow(studio.server, id_))
    assert states[-1]["state"] == "finished"
    assert any(state["state"] == "running" for state in states)
    return states[-1]


def follow(server: Server, id_: int) -> Iterator[dict[str, Any]]:
    """Yield the states that one connection receives until the event ``end``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TRAINING_S)
    with contextlib.closing(connection):
        while True:  # until the worker of this connection has opened its database
            connection.request("GET", f"/studio/jobs/{id_}/events")
            if (response := connection.getresponse()).status != 503:
                break
            response.read()
        assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
        event = ""
        for line in iter(response.readline, b""):
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                event = value
            elif name == "data" and event == "state":
                yield json.loads(value)
            elif name == "data" and event == "end":
                return
    raise AssertionError("the connection was closed before the training had ended")


def test_a_finished_training_has_figures_and_its_photos_are_in_the_gallery(studio: Studio, finished: dict[str, Any]) -> None:
    progress, version = finished["progress"], finished["version"]
    assert (progress["epoch"], progress["epochs"], len(progress["history"])) == (2, 2, 2)
    assert progress["history"][0]["valid_accuracy_low"] <= progress["history"][0]["valid_accuracy"]
    assert progress["changed_count"] is not None
    assert finished["metrics"]["accuracy"]["low"] <= finished["metrics"]["accuracy"]["value"]
    rows = studio.get(f"/gallery/photos.json?model={version}").json()
    assert rows["total"] == 12
    assert studio.get(rows["rows"][0]["thumbnail"]).status == 200
    page = studio.page(f"/studio/jobs/{finished['id']}")
    assert f"/gallery/incorrect?model={version}" in page
    assert "Put live" in page
    assert studio.page("/studio/runs").count('<li class="panel run">') == 1
    assert "Training" in studio.get(f"/studio/jobs/{finished['id']}/log").body.decode()
    form = studio.page(f"/studio/train?version={version}&reviews=1")
    assert 'value="folder:" selected' in form
    assert 'name="epochs" value="2"' in form


def test_a_model_is_put_live_stays_live_after_a_restart_and_is_rolled_back(studio: Studio, finished: dict[str, Any]) -> None:
    version, photo = finished["version"], next((studio.folder / "data" / "valid").rglob("*.jpg"))
    before = studio.predicted_by(photo)
    rejected = studio.post("runs/first/live", expected_version=before)
    assert (rejected.status, rejected.code) == (409, "bundle_incompatible")
    form = f"expected_version={before}".encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "text/html", **KEY}
    page = studio.request("POST", "/studio/runs/first/live", form, headers=headers)
    assert page.status == 409
    assert b"Put it live anyway, although" in page.body
    assert b"The bundle has the classes cats, dogs, the current one " in page.body
    assert b"allow&#34;" not in page.body
    assert (b'value="classes"' in page.body, b'value="disagreement"' in page.body) == (True, False)
    outdated = studio.post("runs/first/live", expected_version="000000000000", allow=["classes"])
    assert (outdated.status, outdated.code) == (409, "rollout_conflict")
    missing_key = studio.request("POST", "/studio/runs/first/live", b"", headers={"Content-Type": "application/json"})
    assert missing_key.status == 401
    live = studio.post("runs/first/live", expected_version=before, allow=["classes"])
    assert (live.status, live.json()["active"]["version"], live.json()["active"]["actor"]) == (200, version, "ann")
    poll(lambda: {studio.predicted_by(photo) for _ in range(8)} == {version})
    kept = studio.post("runs/first/delete")
    assert (kept.status, kept.code) == (409, "job_conflict")
    assert studio.job(finished["id"])["is_live"]

    studio.restart(signal.SIGKILL)
    assert studio.predicted_by(photo) == version
    assert studio.get("/admin/bundle", **KEY).json()["survives_restart"]
    back = studio.post("runs/rollback", expected_version=version)
    assert (back.status, back.json()["active"]["version"]) == (200, before)
    poll(lambda: {studio.predicted_by(photo) for _ in range(8)} == {before})
    studio.restart(signal.SIGTERM)
    assert studio.predicted_by(photo) == before


def test_a_training_survives_kills_of_itself_and_of_the_service_and_can_be_cancelled(studio: Studio) -> None:
    id_ = studio.submit(epochs="10000", name="second")
    studio.wait_for_epoch(id_, 2)
    os.kill(studio.training_pid("second"), signal.SIGKILL)
    poll(lambda: studio.job(id_)["reason"], within_s=TRAINING_S)
    reached = studio.job(id_)["progress"]["epoch"]
    studio.wait_for_epoch(id_, reached + 1)

    (runner,) = studio.processes("service.studio.job_runner")
    os.kill(runner, signal.SIGKILL)
    poll(lambda: studio.job(id_)["interruptions"] == 1, within_s=TRAINING_S)
    reached = studio.job(id_)["progress"]["epoch"]
    studio.wait_for_epoch(id_, reached + 1)
    assert len(studio.processes("service.studio.job_runner")) == 1
    poll(lambda: studio.job(id_)["interruptions"] == 0)  # it makes progress

    waiting = studio.submit(epochs="1", name="third")
    assert (studio.job(waiting)["state"], studio.job(waiting)["ahead"]) == ("queued", 1)
    assert studio.post(f"jobs/{waiting}/cancel").json()["state"] == "cancelled"

    studio.restart(signal.SIGKILL)
    reached = studio.job(id_)["progress"]["epoch"]
    studio.wait_for_epoch(id_, reached + 1)
    log = studio.get(f"/studio/jobs/{id_}/log").body.decode()
    assert log.count("Resuming after epoch") == 3

    pid = studio.training_pid("second")
    assert studio.post(f"jobs/{id_}/cancel").status == 200
    cancelled = studio.wait_for(id_, "cancelled")
    assert not Path(f"/proc/{pid}").exists()
    assert cancelled["progress"]["epoch"] > reached
    conflict = studio.post(f"jobs/{id_}/cancel")
    assert (conflict.status, conflict.code) == (409, "job_conflict")

    run = studio.folder / "studio" / "runs" / "second"
    assert run.is_dir()
    assert studio.post("runs/second/delete").json() == {"deleted": "second"}
    assert not run.exists()
    assert studio.get(f"/studio/jobs/{id_}").status == 404


def test_what_is_wrong_with_a_training_is_explained(studio: Studio) -> None:
    for fields, status, detail in (
        ({"data": "folder:../..", "backbone": "vgg16"}, 400, "Data: there is no folder '../..' below DATA_DIR."),
        ({"data": "folder:", "backbone": "vgg16", "epochs": "0"}, 400, "Epochs: expected 1 to 10,000 (got 0)."),
        ({"data": "folder:", "backbone": "vgg16", "name": "../a"}, 400,
         "Name: use 1 to 60 letters, digits, - _ and ., and start with a letter or digit."),
    ):  # fmt: skip
        response = studio.post("jobs", **fields)
        assert (response.status, response.json()["detail"]) == (status, detail)
    form = f"data={quote('folder:')}&backbone=efficientnet_lite0&lr=fast".encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "text/html", **KEY}
    page = studio.request("POST", "/studio/jobs", form, headers=headers)
    assert page.status == 400
    assert b"Learning rate: expected a number (got &#39;fast&#39;)." in page.body
    assert b'name="lr" value="fast"' in page.body
    cross_site = studio.request(
        "POST", "/studio/jobs", form, headers={**headers, "Sec-Fetch-Site": "cross-site", "Origin": "https://example.com"}
    )
    assert cross_site.status == 403
    id_ = studio.submit(name="unknown-network", other_backbone="efficientnet_lite99")
    failed = studio.wait_for(id_, "failed")
    assert failed["reason"].startswith("There is no network named 'efficientnet_lite99'.")
