"""The first second of a server: programs are served before the pages are built, and pages wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from flask import Flask
from gunicorn.arbiter import Arbiter
from werkzeug.test import Client, TestResponse

import service.app
from service.app import DeferredApp, create_services
from service.context import Services, services_of
from service.inference.model_manager import ModelManager
from service.settings import Settings
from tests.helpers.server import ANSWER_S, PATIENT, START_S, poll


@pytest.fixture
def services(tiny_bundle: SimpleNamespace) -> Iterator[Services]:
    settings = Settings(bundle=tiny_bundle.path, **PATIENT)
    services = create_services(settings, ModelManager.start(settings))
    services.model_manager.wait(START_S)
    yield services
    services.model_manager.close()


@pytest.fixture
def may_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The pages are not built before it is set."""
    event, build = threading.Event(), service.app.create_full_app

    def build_later(services: Services) -> Flask:
        event.wait(2 * ANSWER_S)
        return build(services)

    monkeypatch.setattr(service.app, "create_full_app", build_later)
    yield event
    event.set()


def test_predictions_are_served_before_the_pages_are_built_and_a_page_waits(
    services: Services, may_build: threading.Event, tiny_bundle: SimpleNamespace
) -> None:
    app = DeferredApp(services)
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()

    def predict() -> TestResponse:
        return Client(app).post("/predict", data=photo, content_type="image/jpeg")

    early = predict()
    assert early.status_code == 200, early.text
    for path in ("/health/live", "/health/ready", "/metrics", "/models", "/v2", "/v2/health/ready"):
        assert Client(app).get(path).status_code == 200, path
    assert Client(app).get("/admin/bundle").status_code == 403
    assert Client(app).get("/v2/nothing").status_code == 404
    assert services_of(app).gallery is None

    with ThreadPoolExecutor(2) as pool:
        pages = [pool.submit(Client(app).get, path) for path in ("/", "/docs")]
        assert predict().status_code == 200
        assert not any(page.done() for page in pages)
        may_build.set()
        assert [page.result(ANSWER_S).status_code for page in pages] == [200, 200]

    late = predict()
    assert late.get_json()["predictions"] == early.get_json()["predictions"]
    assert services_of(app).gallery is not None
    metrics = Client(app).get("/metrics").text
    assert 'http_requests_total{method="POST",route="/predict",status="200"} 3.0' in metrics  # of both applications


def test_a_server_whose_pages_cannot_be_built_ends(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(services: Services) -> Flask:
        raise RuntimeError("no pages")

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(service.app, "create_full_app", fail)
    DeferredApp(services)
    poll(lambda: codes)
    assert codes == [Arbiter.WORKER_BOOT_ERROR]
