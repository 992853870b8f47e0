"""The shared rollout state: one rollout at a time across threads and processes, and atomic writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.http.errors import Problem
from service.rollout import state as module
from service.rollout.state import RolloutState, RolloutStore, SelectedBundle, initial_state, load_selection, save_selection
from service.settings import Settings

ONE = SelectedBundle("/bundles/one", "one", "111111111111", actor="ann", time="2026-01-01T00:00:00+00:00")
TWO = SelectedBundle("/bundles/two", "two", "222222222222", actor="ann", time="2026-01-02T00:00:00+00:00")


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; returns 0, or 9 if it raised Problem."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except Problem:
            code = 9
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take_lock(store: RolloutStore) -> None:
    with store.lock():
        pass


def test_only_one_rollout_runs_at_a_time_in_a_process() -> None:
    store = RolloutStore()
    with store.lock(), pytest.raises(Problem) as caught:
        take_lock(store)
    assert caught.value.code == "rollout_in_progress"
    take_lock(store)


def test_only_one_rollout_runs_at_a_time_over_processes() -> None:
    store = RolloutStore()
    with store.lock():
        assert in_child(lambda: take_lock(store)) == 9
    assert in_child(lambda: take_lock(store)) == 0


def test_a_killed_process_releases_the_lock() -> None:
    store = RolloutStore()

    def die_inside() -> None:
        with store.lock():
            os._exit(0)

    assert in_child(die_inside) == 0
    take_lock(store)


def test_processes_share_the_state() -> None:
    store = RolloutStore(RolloutState(active=ONE))
    assert not store.has_served
    assert in_child(lambda: store.write(RolloutState(active=TWO, previous=ONE, link_fingerprint="x"))) == 0
    assert store.read() == RolloutState(active=TWO, previous=ONE, link_fingerprint="x")
    assert store.bundles_to_load() == [Path("/bundles/two"), Path("/bundles/one")]
    store.publish_version("111111111111")
    assert in_child(lambda: store.publish_version("222222222222")) == 0
    assert store.has_served
    assert sorted(store.worker_versions().values()) == ["111111111111", "222222222222"]
    for pid in store.worker_versions():
        store.remove_worker(pid)
    assert store.worker_versions() == {}
    assert store.has_served


def test_concurrent_changes_are_not_lost() -> None:
    store = RolloutStore()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            store.publish_version("1")
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert list(store.worker_versions()) == sorted(children)


def test_a_write_that_fails_leaves_the_old_state(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RolloutStore(RolloutState(active=ONE))
    monkeypatch.setattr(module.os, "pwrite", lambda descriptor, data, offset: len(data) - 1)
    with pytest.raises(OSError, match="could not be written completely"):
        store.write(RolloutState(active=TWO))
    assert store.read().active == ONE


def test_the_first_model_is_recorded_once() -> None:
    store = RolloutStore()
    store.set_initial(ONE)
    store.set_initial(TWO)
    assert store.read().active == ONE


def test_a_bundle_that_cannot_be_opened_is_not_active(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    assert initial_state(Settings(bundle=tmp_path)).active is None
    assert initial_state(Settings(bundle=tmp_path / "nowhere")) == RolloutState()
    active = initial_state(Settings(bundle=tiny_bundle.path)).active
    assert active is not None
    assert active.bundle == str(tiny_bundle.path.resolve())


def test_the_studio_serves_the_bundles_that_were_selected_after_a_restart(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    first = shutil.copytree(tiny_bundle.path, tmp_path / "first")
    second = shutil.copytree(tiny_bundle.path, tmp_path / "second")
    settings = Settings(bundle=tiny_bundle.path, studio=True, studio_dir=tmp_path)
    shipped = initial_state(settings).active
    assert shipped
    rows = [SelectedBundle(str(path), "tiny", shipped.version, actor="ann", time="2026") for path in (second, first)]
    save_selection(settings, RolloutState(active=rows[0], previous=rows[1]))
    state = initial_state(settings)
    assert (state.active, state.previous) == (rows[0], rows[1])
    without_studio = Settings(bundle=tiny_bundle.path, studio_dir=tmp_path)
    assert initial_state(without_studio).active == shipped
    other = initial_state(Settings(bundle=first, studio=True, studio_dir=tmp_path)).active
    assert other
    assert other.bundle == str(first)  # BUNDLE was changed since
    shutil.rmtree(second)
    assert load_selection(settings) == (rows[1], None)
    shutil.rmtree(first)
    assert initial_state(settings).active == shipped
    (tmp_path / "live.json").write_text("[]")
    assert initial_state(settings).active == shipped
