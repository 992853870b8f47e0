"""The first second of a server: the API is served before the pages are built, and page requests wait."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from flask import Flask
from gunicorn.arbiter import Arbiter
from werkzeug.test import Client, TestResponse

import service.app
from service import create_app
from service.app import DeferredApp, create_services
from service.context import Services, services_of
from service.inference.model_manager import ModelManager
from service.settings import Settings
from service.telemetry.json_logging import TerminalFormatter, logging_config
from tests.helpers.server import LONG_TIMEOUTS, RESPONSE_TIMEOUT_S, ROOT, START_TIMEOUT_S, environment, poll, run_service

pytestmark = pytest.mark.slow


@pytest.fixture
def services(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Iterator[Services]:
    settings = Settings(bundle=tiny_bundle.path, database_url=f"sqlite:///{tmp_path}/reviews.db", **LONG_TIMEOUTS)
    services = create_services(settings, ModelManager.start(settings))
    services.model_manager.wait(START_TIMEOUT_S)
    yield services
    services.model_manager.close()


@pytest.fixture
def may_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event that delays building the pages until it is set."""
    event, build = threading.Event(), service.app.create_full_app

    def build_later(services: Services) -> Flask:
        event.wait(2 * RESPONSE_TIMEOUT_S)
        return build(services)

    monkeypatch.setattr(service.app, "create_full_app", build_later)
    yield event
    event.set()


def test_predictions_are_served_while_the_gallery_is_being_built(
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
    assert Client(app).get("/health/ready").get_json()["gallery"] == "starting"

    with ThreadPoolExecutor(2) as pool:
        pages = [pool.submit(Client(app).get, path) for path in ("/", "/docs")]
        assert predict().status_code == 200
        assert not any(page.done() for page in pages)
        may_build.set()
        assert [page.result(RESPONSE_TIMEOUT_S).status_code for page in pages] == [200, 200]

    poll(lambda: Client(app).get("/health/ready").get_json()["gallery"] == "ready")
    assert Client(app).get("/gallery").status_code == 200
    late = predict()
    assert late.get_json()["predictions"] == early.get_json()["predictions"]
    assert services_of(app).gallery is not None
    metrics = Client(app).get("/metrics").text
    assert 'http_requests_total{method="POST",route="/predict",status="200"} 3.0' in metrics  # of both applications


@pytest.mark.parametrize(("is_replacement", "code"), [(False, Arbiter.WORKER_BOOT_ERROR), (True, 1)])
def test_a_server_whose_pages_cannot_be_built_ends_unless_others_serve(
    services: Services, monkeypatch: pytest.MonkeyPatch, is_replacement: bool, code: int
) -> None:
    """gunicorn ends the server after a worker that could not boot, and replaces workers with other exit codes."""

    def fail(services: Services) -> Flask:
        raise RuntimeError("no pages")

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(service.app, "create_full_app", fail)
    monkeypatch.setattr(service.app, "RETRY_S", 0.0)
    services.rollout.is_replacement = is_replacement
    DeferredApp(services)
    poll(lambda: codes)
    assert codes[0] == code


def test_a_gallery_without_its_database_is_unavailable_and_predictions_are_served(
    tiny_bundle: SimpleNamespace, tmp_path: Path
) -> None:
    app = create_app(Settings(bundle=tiny_bundle.path, database_url=f"sqlite:///{tmp_path}", **LONG_TIMEOUTS))
    models = services_of(app).model_manager
    models.wait(START_TIMEOUT_S)
    poll(lambda: app.test_client().get("/health/ready").get_json()["gallery"] == "unavailable")
    assert app.test_client().get("/health/ready").status_code == 200
    assert app.test_client().get("/gallery").status_code == 503
    models.close()


def test_on_a_terminal_the_server_prints_its_address(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    """Standard output and error are a pseudo-terminal."""
    terminal, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=environment({**LONG_TIMEOUTS, "bundle": tiny_bundle.path, "port": 0, "TMPDIR": tmp_path}),
        stdin=subprocess.DEVNULL,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    output = ""
    with open(terminal, encoding="utf-8", closefd=True) as lines:
        for line in lines:
            output += line
            if "Ready" in line:
                break
        starting, ready = output.splitlines()
        url = re.fullmatch(r"Starting on (http://127\.0\.0\.1:\d+) \.\.\.", starting)
        assert url
        assert ready == f"Ready: {url[1]} (gallery: /gallery). Ctrl-C stops it."
        with urllib.request.urlopen(f"{url[1]}/health/ready") as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(RESPONSE_TIMEOUT_S) == 0


def test_a_bundle_that_has_to_be_merged_is_started_in_the_background(tiny_bundle: SimpleNamespace) -> None:
    """The tests' own network has no pretrained weights elsewhere, so that the merge fails after the server listens."""
    ended = run_service(bundle=tiny_bundle.head)
    assert ended.returncode == Arbiter.WORKER_BOOT_ERROR
    messages = [json.loads(line)["message"] for line in ended.stderr.splitlines()]
    listening = next(number for number, message in enumerate(messages) if message.startswith("Listening at"))
    failed = next(number for number, message in enumerate(messages) if "could not be merged" in message)
    assert listening < failed
    assert "'tiny'" in messages[failed]


def test_records_are_plain_text_on_a_terminal() -> None:
    assert logging_config("info", terminal=True)["root"] == {"level": "WARNING", "handlers": ["stderr"]}
    assert logging_config("debug", terminal=True)["root"]["level"] == "DEBUG"
    assert logging_config("info")["root"]["level"] == "INFO"
    record = logging.makeLogRecord({"levelname": "WARNING", "msg": "rejected", "reason": "It is broken."})
    assert TerminalFormatter().format(record) == "Warning: rejected (It is broken.)"
