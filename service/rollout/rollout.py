"""Replace the bundle that serves without a failed request: load the new one, compare it, then switch.

One worker decides for all: the one that receives the request, or the first to see that BUNDLE's link changed. It records its
decision in the shared state (``service.rollout.state``), and the other workers load the same bundle.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

from models.artifacts.bundle import open_bundle
from models.artifacts.paths import resolve_bundle
from models.errors import BundleError, UserError
from service.cpu_allocation import allocate_resources
from service.http.errors import Problem
from service.inference.model_manager import RETRY_S, LoadedModel, ModelManager, load_model
from service.inference.recent_predictions import Agreement, RecentPrediction
from service.rollout.agreement import ALLOWED_DIFFERENCES, measure_agreement, rejection_reason
from service.rollout.state import (
    RejectedBundle,
    RolloutStore,
    SelectedBundle,
    bundle_fingerprint,
    is_symlinked,
    save_selection,
    utc_now,
)
from service.settings import Settings

log = logging.getLogger("service.rollout")
POLL_INTERVAL_S = 0.25  # how often a worker reads the decisions of the others
INCOMPLETE_LOAD = "The worker that loaded it ended before it was done. Change the link again, or POST /admin/bundle."


class RolloutManager:
    """Decide which bundle serves, and follow the decisions of other workers."""

    def __init__(self, settings: Settings, models: ModelManager, store: RolloutStore) -> None:
        self.store = store
        self._settings, self._models = settings, models
        self._fingerprint: str | None = None  # of the link's target at the last look
        self._retry_at = 0.0
        self.is_replacement = store.has_served  # whether the server served before this worker was started
        models.add_install_callback(self._publish)

    def activate(self, bundle: str, *, actor: str, allow: Collection[str] = ()) -> None:
        """Serve another bundle in all workers.

        Args:
            bundle: Its folder below the setting BUNDLE_ROOT.
            actor: Who requested it.
            allow: What may differ from the current bundle, of ``ALLOWED_DIFFERENCES``.

        Raises:
            Problem: The bundle is rejected or another rollout is in progress; the current bundle keeps serving.
        """
        self._models.get()
        self.activate_folder(self._resolve_below_root(bundle), actor=actor, allow=allow)

    def activate_folder(
        self, folder: Path, *, actor: str, allow: Collection[str] = (), expected_version: str | None = None
    ) -> None:
        """Serve the bundle in a folder, which may be anywhere, in all workers.

        Args:
            folder: The folder, with its links resolved.
            actor: Who requested it.
            allow: What may differ from the current bundle, of ``ALLOWED_DIFFERENCES``.
            expected_version: The version that the request expects to be active, if any.

        Raises:
            Problem: As ``activate``, or another bundle is active than expected.
        """
        self._models.get()
        with self.store.lock():
            self._require_active(expected_version)
            self._models.run_in_loader(partial(self._decide, folder, actor=actor, allow=allow))

    def roll_back(self, *, actor: str, expected_version: str | None = None) -> None:
        """Serve the previous bundle again, after the checks of a start but without a comparison.

        Args:
            actor: Who requested it.
            expected_version: The version that the request expects to be active, if any.

        Raises:
            Problem: There is no previous bundle, it cannot be loaded, or another bundle is active than expected.
        """
        self._models.get()
        with self.store.lock():
            self._require_active(expected_version)
            previous = self.store.read().previous
            if previous is None:
                raise Problem("no_previous_bundle", "No other bundle has served since the server started. Name a bundle.")
            path = Path(previous.bundle)
            self._models.run_in_loader(
                partial(self._decide, path, actor=actor, allow=ALLOWED_DIFFERENCES, version=previous.version)
            )

    def start(self) -> None:
        """Start to follow other workers and BUNDLE's link, in a thread, if there are any."""
        if self.store.is_shared or self._follows_link():
            threading.Thread(target=self._watch, name="watch-rollout", daemon=True).start()

    def _require_active(self, version: str | None) -> None:
        active = self.store.read().active
        if version is not None and active is not None and active.version != version:
            raise Problem(
                "rollout_conflict",
                f"{active.name} {active.version} is active now, put live by {active.actor}. Check it, then try again.",
            )

    def _publish(self, model: LoadedModel) -> None:
        self.store.set_initial(_select(model, self._settings.bundle.resolve(), actor="BUNDLE"))
        self.store.publish_version(model.bundle.version)

    def _follows_link(self) -> bool:
        return bool(self._settings.bundle_poll_s) and is_symlinked(self._settings.bundle)

    def _watch(self) -> None:
        next_check = 0.0
        while not self._models.closed.wait(POLL_INTERVAL_S):
            try:
                self._models.get()  # Problem until the first model serves
                if self._is_stale() and not self._adopt():
                    self._models.run_in_loader(self._follow)
                if self._follows_link() and time.monotonic() >= next_check:
                    next_check = time.monotonic() + self._settings.bundle_poll_s
                    self._check_link()
            except Problem as problem:  # not ready, decided by another worker, or rejected, which the state records
                problem.without_traceback()
            except Exception:
                log.exception("watching for rollouts failed")

    def _is_stale(self) -> bool:
        active = self.store.read().active
        return active is not None and active.version != self._models.get().bundle.version

    def _adopt(self) -> bool:
        """Make this worker's bundle the active one if the active folder was overwritten with it before this worker started."""
        current, active = self._models.get(), self.store.read().active
        if active is None or _version_at(Path(active.bundle)) != current.bundle.version:
            return False
        log.warning("the folder contains another bundle", extra={"bundle": active.bundle, "expected_version": active.version})
        with self.store.lock():
            selected = _select(current, Path(active.bundle), actor=active.actor)
            self.store.write(dataclasses.replace(self.store.read(), active=selected))
        return True

    def _follow(self) -> None:
        """Load the bundle that another worker activated. After a failure wait before the next attempt."""
        current, active = self._models.get(), self.store.read().active
        if active is None or active.version == current.bundle.version or time.monotonic() < self._retry_at:
            return
        try:
            model = self._load(Path(active.bundle), version=active.version)
        except Problem as problem:
            self._retry_at = time.monotonic() + RETRY_S
            self._models.metrics.rollouts.labels("failed").inc()
            log.error("could not follow a rollout", extra={"bundle": active.bundle, "reason": problem.detail})
            return
        agreement, predictions = measure_agreement(current, model, self._models.recent_predictions)
        self._switch(model, agreement, predictions, outcome="synced", actor=active.actor)

    def _check_link(self) -> None:
        """Activate BUNDLE's target if it changed and is the same as at the last look, which means that it is complete."""
        before, self._fingerprint = self._fingerprint, bundle_fingerprint(self._settings.bundle)
        if self._fingerprint and self._fingerprint == before and before != self.store.read().link_fingerprint:
            with self.store.lock():
                self._models.run_in_loader(partial(self._activate_link, before))

    def _activate_link(self, fingerprint: str) -> None:
        state, path = self.store.read(), self._settings.bundle.resolve()
        if state.link_fingerprint == fingerprint:
            return  # another worker did it
        # Recorded before loading, so that a bundle that kills the process does not kill one worker after the other.
        incomplete = RejectedBundle(str(path), "bundle_invalid", INCOMPLETE_LOAD, actor="BUNDLE", time=utc_now())
        self.store.write(dataclasses.replace(state, link_fingerprint=fingerprint, last_rejection=incomplete))
        self._decide(path, actor="BUNDLE")
        self.store.write(dataclasses.replace(self.store.read(), last_rejection=state.last_rejection))

    def _decide(self, path: Path, *, actor: str, allow: Collection[str] = (), version: str | None = None) -> None:
        """Load and compare a bundle, then record and switch to it, or reject it.

        ``version`` is the required version of a rollback. Raises Problem.
        """
        self._follow()
        state, current = self.store.read(), self._models.get()
        try:
            if _version_at(path) == current.bundle.version and version in (None, current.bundle.version):
                return
            model = self._load(path, version=version)
            agreement, predictions = self._compare(current, model, allow)
        except Problem as problem:
            rejection = RejectedBundle(str(path), problem.code, problem.detail, actor=actor, time=utc_now())
            self.store.write(dataclasses.replace(state, last_rejection=rejection))
            self._models.metrics.rollouts.labels("rejected").inc()
            extra = {"bundle": str(path), "code": problem.code, "reason": problem.detail, "actor": actor}
            log.warning("rejected", extra=extra)
            raise
        selected = _select(model, path, actor=actor, agreement=agreement)
        decided = dataclasses.replace(state, active=selected, previous=state.active)
        try:
            save_selection(self._settings, decided)
            self.store.write(decided)
        except BaseException:  # a full disk: the other workers would not follow
            model.batcher.close()
            raise
        self._switch(model, agreement, predictions, outcome="rolled_back" if version else "activated", actor=actor)

    def _compare(
        self, current: LoadedModel, model: LoadedModel, allow: Collection[str]
    ) -> tuple[Agreement, list[RecentPrediction]]:
        """Measure how far two models agree. Raises Problem, with ``model`` closed, if that is not enough."""
        try:
            agreement, predictions = measure_agreement(current, model, self._models.recent_predictions)
            if problem := rejection_reason(current, model, agreement, min_agreement=self._settings.min_agreement, allow=allow):
                raise problem
        except BaseException:
            model.batcher.close()
            raise
        return agreement, predictions

    def _load(self, path: Path, *, version: str | None = None) -> LoadedModel:
        """Load the bundle at ``path``, which must have the ``version`` if that is given. Raises Problem."""
        try:
            if version and _version_at(path) != version:
                raise BundleError(f"{path} no longer contains the bundle with the version {version}.")
            models = self._models
            return load_model(self._settings, allocate_resources(self._settings), models.metrics, models.decoder, path=path)
        except UserError as error:
            raise Problem("bundle_invalid", str(error)).without_traceback() from None
        except Exception as error:
            log.exception("loading failed")
            raise Problem("bundle_invalid", f"The bundle {path} could not be loaded: {error!r}").without_traceback() from None

    def _switch(
        self, model: LoadedModel, agreement: Agreement, predictions: list[RecentPrediction], *, outcome: str, actor: str
    ) -> None:
        previous = self._models.get().bundle.version
        self._models.metrics.rollouts.labels(outcome).inc()  # before a response can show that the model serves
        self._models.install(model, predictions)
        log.info(
            outcome,
            extra={
                "model": model.bundle.name,
                "version": model.bundle.version,
                "previous": previous,
                "actor": actor,
                "agreement": asdict(agreement),
            },
        )

    def _resolve_below_root(self, bundle: str) -> Path:
        """Resolve a folder and its links. Raises Problem if it is not below BUNDLE_ROOT."""
        root = self._settings.resolved_bundle_root
        try:
            path = (root / bundle).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # for example a NUL or a loop of links
            raise Problem("bundle_invalid", f"{bundle[:200]!r} is not a usable path ({error}).") from None
        if not path.is_relative_to(root) or path == root:
            raise Problem("bundle_invalid", f"{bundle[:200]!r} is not below {root}. Set BUNDLE_ROOT to the folder of bundles.")
        return path


def _version_at(path: Path) -> str:
    """Read the version of the bundle at ``path``. Raises Problem."""
    try:
        return open_bundle(resolve_bundle(path), files=()).version
    except UserError as error:
        raise Problem("bundle_invalid", str(error)).without_traceback() from None
    except Exception as error:  # a manifest may contain anything, and a file system may fail in any way
        raise Problem(
            "bundle_invalid", f"The bundle {str(path)[:200]} cannot be read: {repr(error)[:200]}"
        ).without_traceback() from None


def _select(model: LoadedModel, path: Path, *, actor: str, agreement: Agreement | None = None) -> SelectedBundle:
    return SelectedBundle(
        str(path),
        model.bundle.name,
        model.bundle.version,
        actor=actor,
        time=utc_now(),
        agreement=asdict(agreement) if agreement else None,
    )
