"""The model manager: retries, fallbacks and callbacks of the first load, and memory that is returned."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.http.errors import Problem
from service.inference import model_manager as module
from service.inference.model_manager import MERGING, LoadedModel, ModelManager
from service.settings import Settings
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, poll

ALLOCATE = """
import sys
from models.runtime.allocator import return_large_blocks
if sys.argv[1] == "set":
    return_large_blocks()
for _ in range(3):
    body = b"x" * (20 << 20)  # the first is mapped; once it is freed, glibc takes the others from a heap
    above = [b"y" * 100_000 for _ in range(50)]  # follow it there, and keep the heap from shrinking
    del body
    keep = above
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""
Start = Callable[..., ModelManager]


@pytest.fixture
def start(tiny_bundle: SimpleNamespace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setattr(module, "RETRY_S", 0.05)

    def start(paths: Sequence[Path]) -> ModelManager:
        manager = ModelManager.start(Settings(bundle=tiny_bundle.path, **LONG_TIMEOUTS), bundles_to_load=lambda: paths)
        request.addfinalizer(manager.close)
        return manager

    return start


def test_a_missing_bundle_is_loaded_once_it_is_there(start: Start, tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    reasons: list[str] = []
    manager = start([tmp_path / "bundle"])
    manager.add_failure_callback(reasons.append)
    with pytest.raises(Problem, match="is not a bundle") as caught:
        manager.wait(START_TIMEOUT_S)
    assert (caught.value.code, caught.value.headers) == ("not_ready", {"Retry-After": "0"})
    poll(lambda: len(reasons) > 1)
    shutil.copytree(tiny_bundle.path, tmp_path / "moving")
    (tmp_path / "moving").rename(tmp_path / "bundle")
    assert manager.installed.wait(START_TIMEOUT_S)
    assert manager.get().bundle.path == tmp_path / "bundle"


def test_the_next_bundle_is_loaded_if_the_first_cannot_be(start: Start, tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    manager = start([tmp_path, tiny_bundle.path])
    assert manager.wait(START_TIMEOUT_S).bundle.path == tiny_bundle.path


def test_an_install_callback_is_called_once_per_model_and_may_fail(start: Start, tiny_bundle: SimpleNamespace) -> None:
    early: list[str] = []
    late: list[str] = []

    def fail(model: LoadedModel) -> None:
        raise ZeroDivisionError

    manager = start([tiny_bundle.path])
    manager.add_install_callback(fail)
    manager.add_install_callback(lambda model: early.append(model.bundle.version))
    model = manager.wait(START_TIMEOUT_S)
    manager.add_install_callback(lambda model: late.append(model.bundle.version))
    manager.run_in_loader(lambda: None)
    assert early == late == [model.bundle.version]


def test_a_head_only_bundle_is_merged_before_it_is_loaded(
    start: Start, tiny_bundle: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command is replaced: it fails first, and then puts the merged bundle in its place."""
    head, merged = SimpleNamespace(is_head_only=True), tmp_path / "merged"
    command = "import shutil, sys; sys.exit('service: no weights')"

    def popen(arguments: list[str], **options: object) -> subprocess.Popen[str]:
        assert arguments == [sys.executable, "-m", "finetune", "merge", str(tmp_path)]
        return real_popen([sys.executable, "-c", command], **options)  # type: ignore[call-overload, no-any-return]

    real_popen, real_open = subprocess.Popen, module.open_bundle
    monkeypatch.setattr(module.subprocess, "Popen", popen)
    monkeypatch.setattr(module, "merged_dir", lambda bundle: merged)
    monkeypatch.setattr(module, "resolve_bundle", lambda path: merged)
    monkeypatch.setattr(module, "open_bundle", lambda path, **kw: head if path == tmp_path else real_open(path, **kw))
    manager = start([tmp_path])
    with pytest.raises(Problem, match="could not be merged with its pretrained weights: service: no weights"):
        manager.wait(START_TIMEOUT_S)
    assert manager._progress == MERGING
    command = f"import shutil; shutil.copytree({str(tiny_bundle.path)!r}, {str(merged)!r})"
    assert manager.installed.wait(START_TIMEOUT_S)
    assert manager.get().bundle.path == merged


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_large_blocks_are_returned_to_the_system() -> None:
    def rss_mb(mode: str) -> float:
        done = subprocess.run([sys.executable, "-c", ALLOCATE, mode], capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024

    assert rss_mb("set") < rss_mb("unset") - 15
