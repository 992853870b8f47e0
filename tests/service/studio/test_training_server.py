"""Trainings under gunicorn: start, follow, kill, cancel, resume, put live, restart and roll back over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import PhotoFolder
from tests.helpers.server import Server, poll
from tests.helpers.studio_server import KEY, TRAINING_S, Studio

pytestmark = pytest.mark.slow


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
