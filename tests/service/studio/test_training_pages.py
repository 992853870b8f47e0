"""The pages of training runs, with jobs that a test writes instead of trainings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask

from models.artifacts.tuning_result import PRESETS, TUNING_FILE, default_tuning_dir
from service import create_app
from service.context import services_of
from service.db.connection import Database
from service.db.training_jobs import CANCELLED, FINISHED, claim_job, end_job, get_job, submit_job
from service.http.security import KEY_COOKIE
from service.rollout.agreement import rejection_reason
from service.rollout.state import SelectedBundle
from service.settings import Settings
from service.studio.data_sets import DataSet
from service.studio.findings import data_fingerprint
from service.studio.job_files import JobFiles
from service.studio.training_settings import parse_settings
from service.studio.workspace import Workspace
from tests.conftest import NewDatabase
from tests.helpers.server import LONG_TIMEOUTS, poll

HTML = {"Accept": "text/html"}
START_TIMEOUT_S = 300
SPEED = {"reading_s_per_image": 1.0, "epoch_s_per_image": 0.0, "other_s": 0.0, "epochs": 1, "images": 1, "total_s": 1.0}


class Studio:
    """An application with the studio, and its queue."""

    def __init__(self, app: Flask, database: Database, settings: Settings) -> None:
        self.app, self.database, self.settings = app, database, settings

    def add(
        self,
        run: str,
        state: str,
        *,
        data: str = "dataset:pets",
        version: str | None = None,
        speed: dict[str, float] | None = None,
        **form: str,
    ) -> int:
        """Add a run that was started with a form, and is over."""
        settings = parse_settings({"backbone": "vgg16", **form})
        with self.database.write() as connection:
            id_ = submit_job(connection, run=run, settings=settings, data=data, reviews=0, actor="ann", max_queued=9)
            while (claimed := claim_job(connection, "runner", max_running=99)) and claimed.id != id_:
                pass  # one of another test, whose lease has ended
            if state != "running":
                end_job(connection, id_, state, version=version, speed=speed)
        return id_

    def report(self, id_: int, *events: dict[str, Any]) -> None:
        with self.database.read() as connection:
            path = JobFiles.of(self.settings, get_job(connection, id_)).progress
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events))

    def page(self, path: str) -> str:
        response = self.app.test_client().get(path, headers=HTML)
        assert response.status_code == 200
        return response.text


@pytest.fixture(scope="module")
def studio(
    tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, new_database: NewDatabase
) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "datasets" / "pets" / "cats").mkdir(parents=True)
    (folder / "datasets" / "pets" / "cats" / "1.jpg").write_bytes(b"photo")
    with new_database("sqlite") as url:
        settings = Settings(
            bundle=tiny_bundle.path,
            studio=True,
            studio_dir=folder,
            database_url=url,
            admin_keys=("ann:sesame",),
            **LONG_TIMEOUTS,
        )
        app = create_app(settings)
        services_of(app).model_manager.wait(START_TIMEOUT_S)
        poll(lambda: app.test_client().get("/studio/jobs").status_code == 200)
        yield Studio(app, Database(url, timeout_s=300), settings)
        services_of(app).model_manager.close()


def epoch(**values: Any) -> dict[str, Any]:
    row = {"train_loss": 0.5, "valid_loss": 0.5, "train_accuracy": 0.75, "valid_accuracy": 0.75, "seconds": 2.0}
    return {"event": "epoch", "epoch": 1, "epochs": 1, "best_epoch": 1, **row, **values}


@pytest.mark.parametrize(("head", "has_epochs"), [("linear", True), ("logistic", False)])
def test_a_run_without_epochs_shows_none(studio: Studio, head: str, has_epochs: bool) -> None:
    id_ = studio.add(head, "running")
    training = {"event": "training", "head": head, "epochs": 1, "epoch": 0, "train": 8, "valid": 4}
    studio.report(id_, training)
    assert ("epoch 1 of 1" in studio.page(f"/studio/jobs/{id_}")) == has_epochs
    studio.report(id_, training, epoch())
    page = studio.page(f"/studio/jobs/{id_}")
    assert "75.00%" in page
    assert ("best in epoch 1" in page, 'class="chart"' in page) == (has_epochs, has_epochs)
    with studio.database.write() as connection:
        end_job(connection, id_, CANCELLED)
    page = studio.page(f"/studio/jobs/{id_}")
    assert ("Resume after epoch 1" if has_epochs else ">Resume<") in page
    assert "Canceled" in page


def test_the_figures_are_those_of_the_best_epoch(studio: Studio) -> None:
    id_ = studio.add("overfitted", "running")
    best = epoch(valid_loss=0.125, valid_accuracy=0.875, valid_accuracy_low=0.7, valid_accuracy_high=0.95)
    worse = epoch(epoch=2, best_epoch=1, valid_loss=0.75, valid_accuracy=0.625)
    studio.report(id_, {"event": "training", "epochs": 3, "epoch": 0, "train": 8, "valid": 4}, best, worse)
    page = studio.page(f"/studio/jobs/{id_}")
    assert "<dd>87.50%<small>in epoch 1</small><small>95% interval 70.0% to 95.0%</small></dd>" in page
    assert "<dd>0.1250<small>best in epoch 1</small></dd>" in page


def test_time_is_estimated_from_runs_with_the_same_head(studio: Studio) -> None:
    studio.add("measured-logistic", FINISHED, speed=SPEED, head="logistic")
    studio.add("measured-linear", FINISHED, speed=SPEED, epochs="3")

    def estimated_from(query: str) -> str | None:
        response = studio.app.test_client().get(f"/studio/train/estimate.json?data=dataset:pets&backbone=vgg16{query}")
        found: str | None = response.get_json()["run"]
        return found

    assert estimated_from("&head=logistic") == "measured-logistic"
    assert estimated_from("&head=linear") == "measured-linear"
    assert estimated_from("&lr=0.1") == "measured-linear"
    assert estimated_from("&patience=0") is None  # the recipe decides, and no such run was measured
    assert estimated_from("&epochs=2&augment=1") is None
    assert estimated_from("&epochs=many") is None


def test_the_time_left_of_a_run_is_estimated_from_an_earlier_one(studio: Studio) -> None:
    studio.add("measured", FINISHED, speed=SPEED | {"other_s": 5000.0}, backbone="resnet50", head="logistic")
    id_ = studio.add("similar", "running", backbone="resnet50", head="logistic")
    state = studio.app.test_client().get(f"/studio/jobs/{id_}").get_json()
    assert 4000 < state["seconds_left"] <= 5001
    assert "<dt>Time left</dt><dd>83 min</dd>" in studio.page(f"/studio/jobs/{id_}")
    other = studio.add("other", "running", backbone="resnet50", head="linear")
    assert studio.app.test_client().get(f"/studio/jobs/{other}").get_json()["seconds_left"] is None


def test_the_form_offers_the_presets_of_tune(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = studio.app.test_client()
    path = "/studio/train?data=dataset:pets"
    assert "finetune tune" not in studio.page(path)
    missing = client.get(f"{path}&preset=best")
    assert (missing.status_code, missing.get_json()["detail"]) == (
        400,
        "There is no preset 'best' for this data. Run `finetune tune` on this data first.",
    )
    chosen = {"backbone": "efficientnet_lite0+flip", "head": "logistic", "normalization": "standard", "penalty": 0.00316}
    file = default_tuning_dir(studio.settings.resolved_studio_dir / "datasets" / "pets") / TUNING_FILE
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"presets": dict.fromkeys(PRESETS, chosen)}))
    assert "Best: efficientnet_lite0+flip" in studio.page(path)
    form = studio.page(f"{path}&preset=fast")
    for shown in (
        '<option value="efficientnet_lite0+flip" selected>',
        '<option value="logistic" selected>',
        '<option value="standard" selected>',
        'name="penalty" value="0.00316"',
    ):
        assert shown in form


def test_a_data_set_that_is_trained_on_is_neither_renamed_nor_deleted(studio: Studio) -> None:
    (studio.settings.resolved_studio_dir / "datasets" / "birds" / "ducks").mkdir(parents=True)
    id_ = studio.add("uses-birds", "running", data="dataset:birds")
    client, key = studio.app.test_client(), {"X-API-Key": "sesame"}
    requests = {"delete": {"confirm": "birds"}, "rename": {"to": "others"}}
    for action, fields in (*requests.items(), ("rename", {"to": "geese", "class": "ducks"})):
        response = client.post(f"/studio/datasets/birds/{action}", json=fields, headers=key)
        assert (response.status_code, response.get_json()["code"], response.get_json()["detail"]) == (
            409,
            "dataset_busy",
            "The training run uses-birds uses birds. Wait until it has ended, or cancel it.",
        )
        page = client.post(f"/studio/datasets/birds/{action}", data=fields, headers=key | HTML)
        assert page.status_code == 409
        assert "The training run uses-birds uses birds. Wait until it has ended, or cancel it." in page.text
    with studio.database.write() as connection:
        end_job(connection, id_, CANCELLED)
    for action, fields in (("rename", {"to": "others"}), ("delete", {"confirm": "others"})):
        name = "birds" if action == "rename" else "others"
        assert client.post(f"/studio/datasets/{name}/{action}", json=fields, headers=key).status_code == 200


def test_what_is_ignored_in_the_audit_is_accepted_by_training(studio: Studio) -> None:
    folder = studio.settings.resolved_studio_dir / "datasets" / "leaky"
    for path in ("train/a/1.jpg", "train/b/2.jpg", "valid/a/3.jpg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"photo")
    data_set = DataSet(Workspace.of(studio.settings), studio.settings, "leaky")
    nothing = {"unlabeled": {}, "small_classes": {}, "empty_classes": [], "imbalance": 1.0, "skipped": {}, "damaged": {}}
    groups = {"leakage": [["train/a/1.jpg", "valid/a/3.jpg"]], "conflicts": [], "duplicates": []}
    report = nothing | groups | {"class_mismatch": {"training": ["b"]}, "counts": {}}
    data_set.write_state("audit.json", {"report": report, "fingerprint": data_fingerprint(data_set)})
    client, key = studio.app.test_client(), {"X-API-Key": "sesame"}
    audit = client.get("/studio/datasets/leaky/audit.json").get_json()
    keys = {finding["kind"]: finding["key"] for finding in audit["findings"]}
    assert (set(keys), audit["accepted"]) == ({"leakage", "classes"}, {})

    def settings_of_a_run() -> dict[str, Any]:
        fields = {"data": "dataset:leaky", "backbone": "vgg16"}
        id_ = client.post("/studio/jobs", json=fields, headers=key).get_json()["id"]
        job = client.post(f"/studio/jobs/{id_}/cancel", json={}, headers=key).get_json()
        return dict(job["settings"])

    def ignore(*kinds: str) -> None:
        fields = {"finding": [keys[kind] for kind in kinds]}
        assert client.post("/studio/datasets/leaky/audit/ignore", json=fields, headers=key).status_code == 200

    assert settings_of_a_run() == {"backbone": "vgg16"}
    ignore("leakage")
    assert settings_of_a_run() == {"backbone": "vgg16", "allow_leakage": True}
    ignore("classes")
    assert settings_of_a_run() == {"backbone": "vgg16", "allow_leakage": True, "allow_class_mismatch": True}
    note = (
        "Training accepts equal photos in training and validation and missing or too small classes, because these findings are"
        " ignored."
    )
    for page in ("/studio/train?data=dataset:leaky", "/studio/datasets/leaky/audit"):
        assert note in studio.page(page)
    (folder / "train" / "b" / "4.jpg").write_bytes(b"another photo")
    assert settings_of_a_run() == {"backbone": "vgg16"}
    assert "were ignored, but the photos have changed since. Check them again first." in studio.page(
        "/studio/train?data=dataset:leaky"
    )


def test_neither_the_live_nor_the_previous_run_can_be_deleted(studio: Studio) -> None:
    id_ = studio.add("previous", FINISHED, version="0123456789ab")
    assert "Delete this run" in studio.page(f"/studio/jobs/{id_}")
    store = services_of(studio.app).rollout.store
    before = store.read()
    selected = SelectedBundle("x", "previous", "0123456789ab", actor="ann", time="")
    with store.lock():
        store.write(replace(before, previous=selected))
    page = studio.page(f"/studio/jobs/{id_}")
    with store.lock():
        store.write(before)
    assert "The previous model cannot be deleted, because a rollback serves it again." in page
    assert "Delete this run" not in page


def test_training_pages_offer_to_sign_in(studio: Studio) -> None:
    id_ = studio.add("any", FINISHED)
    for path in ("/studio/train?data=dataset:pets", "/studio/runs", f"/studio/jobs/{id_}"):
        assert f'name="back" value="{path}"' in studio.page(path)
    client = studio.app.test_client()
    client.set_cookie(KEY_COOKIE, "sesame")
    assert 'class="panel sign-in"' not in client.get("/studio/runs", headers=HTML).text


def test_the_advice_for_programs_is_apart_from_the_reason() -> None:
    old = SimpleNamespace(bundle=SimpleNamespace(classes=("a", "b")))
    new = SimpleNamespace(bundle=SimpleNamespace(classes=("a", "c")))
    agreement = SimpleNamespace(agreed=1, compared=4, fraction=0.25)
    reasons = {
        model: rejection_reason(old, candidate, agreement, min_agreement=0.9, allow=())  # type: ignore[arg-type]
        for model, candidate in (("new", new), ("old", old))
    }
    assert {name: problem and (problem.difference, problem.reason) for name, problem in reasons.items()} == {
        "new": ("classes", "The bundle has the classes a, c, the current one a, b, in this order."),
        "old": (
            "disagreement",
            "The bundle agrees with the current one on 1 of the last 4 images, but MIN_AGREEMENT is 90%.",
        ),
    }
    assert reasons["old"]
    assert reasons["old"].detail == f'{reasons["old"].reason} If that is intended, send "allow": ["disagreement"].'
