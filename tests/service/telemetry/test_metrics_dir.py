"""The folder of the workers' metrics: removed with its server, reused after a kill, and restored if it is deleted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.telemetry import metrics_dir as module
from service.telemetry.metrics_dir import DIR_PREFIX, DIR_VARIABLE, create_metrics_dir, remove_metrics_dir, restore_metrics_dir

WORKER = """
import os
from service.telemetry.metrics import Metrics
metrics = Metrics()
metrics.batch_size.observe(3)
assert b"classifier_batch_size_sum 3.0" in metrics.render()
with open(os.path.join(os.environ["PROMETHEUS_MULTIPROC_DIR"], "gauge_livesum_1.db"), "x"):
    pass  # another worker has only just created it
assert b"classifier_batch_size_sum 3.0" in metrics.render()
for file in os.scandir(os.environ["PROMETHEUS_MULTIPROC_DIR"]):
    os.unlink(file)
os.rmdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])
assert b"classifier_batch_size_sum 3.0" in metrics.render()
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which servers create the folders of their metrics."""
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)  # no /dev/shm
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_descriptor", None)
    monkeypatch.setenv(DIR_VARIABLE, "")
    yield tmp_path
    if module._descriptor is not None:
        os.close(module._descriptor)


def age(folder: Path) -> Path:
    old = time.time() - 3600
    os.utime(folder, (old, old))
    return folder


def test_the_folder_of_a_killed_server_is_removed_and_that_of_a_running_one_stays(parent: Path) -> None:
    running = age(create_metrics_dir())
    kept_descriptor = module._descriptor
    killed = parent / f"{DIR_PREFIX}killed"
    killed.mkdir()
    (killed / "counter_1.db").touch()
    age(killed)
    starting = parent / f"{DIR_PREFIX}starting"
    starting.mkdir()
    new = create_metrics_dir()
    assert set(parent.iterdir()) == {running, starting, new}
    remove_metrics_dir()
    assert set(parent.iterdir()) == {running, starting}
    assert kept_descriptor is not None
    os.close(kept_descriptor)


def test_a_folder_that_something_removed_is_created_again_and_locked(parent: Path) -> None:
    folder = create_metrics_dir()
    restore_metrics_dir()
    folder.rmdir()
    restore_metrics_dir()
    assert list(parent.iterdir()) == [folder]
    with pytest.raises(BlockingIOError):
        module._lock(folder)


def test_a_worker_reports_metrics_while_another_one_starts_and_after_the_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", WORKER], env=os.environ | {DIR_VARIABLE: str(folder)}, check=True)
