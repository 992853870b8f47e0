"""Killed workers of a running server are replaced, whatever was deleted since the start."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest

from service.rollout import state
from service.rollout.state import RolloutStore
from service.settings import Settings, process_settings
from tests.helpers.server import poll, serve

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "service" / "gunicorn.conf.py"


def test_a_replacement_waits_for_its_bundle_and_the_other_worker_serves(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    """A replacement that cannot load, or lacks the folder of a setting, must not end the server."""
    bundle, away, data = tmp_path / "bundle", tmp_path / "away", tmp_path / "data"
    shutil.copytree(tiny_bundle.path, bundle)
    data.mkdir()
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()
    with serve(bundle, web_concurrency=2, data_dir=data) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        bundle.rename(away)
        data.rmdir()
        victim, survivor = server.workers()
        os.kill(victim, signal.SIGKILL)
        poll(lambda: any("is not a bundle" in line["message"] for line in server.log()))
        assert len(server.workers()) == 2
        for _ in range(50):  # none is accepted by the worker that is not ready
            assert server.get("/health/ready").status == 200
            assert server.post(photo).status == 200
        assert server.metrics()["classifier_ready_workers"] == 1
        away.rename(bundle)
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        assert survivor in server.workers()


def test_the_last_worker_is_replaced_by_one_that_reports_what_is_missing(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    bundle, away = tmp_path / "bundle", tmp_path / "away"
    shutil.copytree(tiny_bundle.path, bundle)
    with serve(bundle) as server:
        bundle.rename(away)
        os.kill(server.workers()[0], signal.SIGKILL)
        poll(lambda: server.get("/health/ready").status == 503)
        poll(lambda: "is not a bundle" in str(server.get("/health/ready").body))
        assert server.get("/health/ready").code == "not_ready"
        assert server.get("/health/live").status == 200
        away.rename(bundle)
        poll(lambda: server.get("/health/ready").status == 200)


def test_a_killed_server_leaves_nothing_in_the_temporary_folder(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        os.kill(server.pid, signal.SIGKILL)
        workers = server.workers()
        poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        assert [path.name for path in server.log_file.parent.iterdir()] == ["stderr"]


@pytest.fixture
def worker_exit(tiny_bundle: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[FunctionType]:
    """The hook of gunicorn's configuration, for a server of the bundle ``tiny``."""
    for row in Settings.__dataclass_fields__:
        monkeypatch.delenv(row.upper(), raising=False)
    monkeypatch.setenv("BUNDLE", str(tiny_bundle.path))
    process_settings.cache_clear()
    yield runpy.run_path(str(CONFIG))["worker_exit"]
    process_settings.cache_clear()


def test_a_worker_that_failed_before_it_built_the_application_ends_without_an_error(worker_exit: FunctionType) -> None:
    worker_exit(None, SimpleNamespace())


@pytest.mark.parametrize(("has_served", "code"), [(False, 3), (True, 1)])
def test_a_worker_that_cannot_boot_ends_the_server_only_if_none_has_served(
    worker_exit: FunctionType, monkeypatch: pytest.MonkeyPatch, has_served: bool, code: int
) -> None:
    """gunicorn ends the server after the exit code 3, and replaces workers with other exit codes."""
    store = RolloutStore(is_shared=True)
    monkeypatch.setattr(state, "_shared", store)
    monkeypatch.setitem(worker_exit.__globals__, "BOOT_RETRY_S", 0.0)
    if has_served:
        store.publish_version("123456789abc")
    pid = os.fork()
    if pid == 0:
        try:
            try:
                sys.exit(3)
            finally:
                worker_exit(None, SimpleNamespace())
        except BaseException as error:
            os._exit(error.code if isinstance(error, SystemExit) else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
