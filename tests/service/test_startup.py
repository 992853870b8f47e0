"""The first second of a server: who is answered before the pages are there, who waits, and what broken pages end in."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from flask import Flask
from gunicorn.arbiter import Arbiter
from werkzeug.test import Client, TestResponse

import service.full_app
from service.app import create_services
from service.context import Services, services_of
from service.deferred_app import DeferredApp
from service.inference.model_manager import ModelManager
from service.settings import Settings
from tests.helpers.server import ANSWER_S, PATIENT, START_S, poll


@pytest.fixture
def core(tiny_bundle: SimpleNamespace) -> Iterator[Services]:
    settings = Settings(bundle=tiny_bundle.path, **PATIENT)
    core = create_services(settings, ModelManager.start(settings))
    core.model_manager.wait(START_S)
    yield core
    core.model_manager.close()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The pages are not built before it is set."""
    held, build = threading.Event(), service.full_app.create_full_app

    def build_later(core: Services) -> Flask:
        held.wait(2 * ANSWER_S)
        return build(core)

    monkeypatch.setattr(service.full_app, "create_full_app", build_later)
    yield held
    held.set()


def test_photos_are_answered_before_the_pages_are_there_and_a_page_is_waited_for(
    core: Services, hold: threading.Event, tiny_bundle: SimpleNamespace
) -> None:
    opening = DeferredApp(core)
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()

    def predict() -> TestResponse:
        return Client(opening).post("/predict", data=photo, content_type="image/jpeg")

    early = predict()
    assert early.status_code == 200, early.text
    for path in ("/health/live", "/health/ready", "/metrics", "/models", "/v2", "/v2/health/ready"):
        assert Client(opening).get(path).status_code == 200, path
    assert Client(opening).get("/admin/bundle").status_code == 403
    assert Client(opening).get("/v2/nothing").status_code == 404
    assert services_of(opening).gallery is None

    with ThreadPoolExecutor(2) as pool:
        pages = [pool.submit(Client(opening).get, path) for path in ("/", "/docs")]
        assert predict().status_code == 200
        assert not any(page.done() for page in pages)
        hold.set()
        assert [page.result(ANSWER_S).status_code for page in pages] == [200, 200]

    late = predict()
    assert late.get_json()["predictions"] == early.get_json()["predictions"]
    assert services_of(opening).gallery is not None
    counted = Client(opening).get("/metrics").text
    assert 'http_requests_total{method="POST",route="/predict",status="200"} 3.0' in counted  # of both applications


def test_a_server_whose_pages_cannot_be_built_ends(core: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setitem(sys.modules, "service.full_app", None)
    DeferredApp(core)
    poll(lambda: codes)
    assert codes == [Arbiter.WORKER_BOOT_ERROR]
