"""Put another bundle in the place of the one that serves, without a failed request: load beside it, check, then exchange.

One worker decides, for all: the one that is asked, or the first that sees BUNDLE's link lead elsewhere. It writes what it
chose on the board (``service.rollout.state``), and the other workers load the same. Who is in the middle of an answer
finishes it with the model that it began with (``service.inference.predictor``).
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
from service.http.errors import Problem
from service.inference.model_manager import LoadedModel, ModelManager, load_model
from service.inference.recent_predictions import Agreement, RecentPrediction
from service.resources import allocate_resources
from service.rollout.agreement import ALLOWED_DIFFERENCES, measure_agreement, rejection_reason
from service.rollout.bundle_link import bundle_fingerprint, is_symlinked, utc_now
from service.rollout.state import RejectedBundle, RolloutState, SelectedBundle
from service.settings import Settings

log = logging.getLogger("service.rollout.rollout")
POLL_INTERVAL_S = 0.25  # how often a worker looks what the others chose
RETRY_S = 10.0  # after it could not load that
INCOMPLETE_LOAD = "The worker that loaded it ended before it was done; change the link again, or POST /admin/bundle."


class RolloutManager:
    """Decides over bundles, and follows what others decided. One for the application."""

    def __init__(self, settings: Settings, served: ModelManager) -> None:
        self._settings, self._served, self._board = settings, served, served.rollout_store
        self._link_seen: str | None = None
        self._not_before = 0.0

    def activate(self, bundle: str, *, actor: str, allow: Collection[str] = ()) -> None:
        """Serve the ``bundle``, a folder below the setting BUNDLE_ROOT, from now on. Raises Problem and changes nothing else.

        ``allow`` names what may differ from the one that serves: ``ALLOWED_DIFFERENCES``.
        """
        self._served.get()
        path = self._inside(bundle)
        with self._board.lock():
            self._served.run_in_loader(partial(self._decide, path, actor=actor, allow=allow))

    def roll_back(self, *, actor: str) -> None:
        """Serve the bundle that did before. It is loaded and checked as at a start, but not compared. Raises Problem."""
        self._served.get()
        with self._board.lock():
            before = self._board.read().previous
            if before is None:
                raise Problem("no_previous_bundle", "No bundle served before this one, since the server was started; name one.")
            path = Path(before.bundle)
            self._served.run_in_loader(
                partial(self._decide, path, actor=actor, allow=ALLOWED_DIFFERENCES, version=before.version)
            )

    def start(self) -> None:
        """Begin to look, in a thread, what other workers chose and where BUNDLE's link leads."""
        if self._board.is_shared or self._follows_link():
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _follows_link(self) -> bool:
        return bool(self._settings.bundle_poll_s) and is_symlinked(self._settings.bundle)

    def _watch(self) -> None:
        next_look = 0.0
        while not self._served.closed.wait(POLL_INTERVAL_S):
            try:
                self._served.get()  # nothing is decided before the first one serves
                if self._lags() and not self._adopt():
                    self._served.run_in_loader(self._follow)
                if self._follows_link() and time.monotonic() >= next_look:
                    next_look = time.monotonic() + self._settings.bundle_poll_s
                    self._look_at_link()
            except Problem as problem:
                problem.without_traceback()  # not ready yet, another decides, or it was refused, which is on the board
            except Exception:
                log.exception("looking for another bundle failed")

    def _lags(self) -> bool:
        wanted = self._board.read().active
        return wanted is not None and wanted.version != self._served.get().bundle.version

    def _adopt(self) -> bool:
        """Where this worker started after the folder was written anew, what it found there is what all serve."""
        current, wanted = self._served.get(), self._board.read().active
        if wanted is None or _version_at(Path(wanted.bundle)) != current.bundle.version:
            return False
        log.warning(
            "another bundle was found in the folder", extra={"bundle": wanted.bundle, "expected_version": wanted.version}
        )
        with self._board.lock():
            found = _chosen(current, Path(wanted.bundle), actor=wanted.actor)
            self._board.write(dataclasses.replace(self._board.read(), active=found))
        return True

    def _follow(self) -> None:
        """Load what another worker chose. After a failure not again for a while."""
        current, wanted = self._served.get(), self._board.read().active
        if wanted is None or wanted.version == current.bundle.version or time.monotonic() < self._not_before:
            return
        try:
            model = self._load(Path(wanted.bundle), version=wanted.version)
        except Problem as problem:
            self._not_before = time.monotonic() + RETRY_S
            self._served.metrics.rollouts.labels("failed").inc()
            log.error("could not follow", extra={"bundle": wanted.bundle, "reason": problem.detail})
            return
        self._exchange(
            model, *measure_agreement(current, model, self._served.recent_predictions), outcome="synced", actor=wanted.actor
        )

    def _look_at_link(self) -> None:
        """Serve what BUNDLE leads to where that is new, and was the same at the last look: not while it is copied."""
        before, self._link_seen = self._link_seen, bundle_fingerprint(self._settings.bundle)
        if self._link_seen and self._link_seen == before and before != self._board.read().link_fingerprint:
            with self._board.lock():
                self._served.run_in_loader(partial(self._take_link, before))

    def _take_link(self, seen: str) -> None:
        state, path = self._board.read(), self._settings.bundle.resolve()
        if state.link_fingerprint == seen:
            return  # another worker was quicker
        # Noted before it is loaded: a bundle that ends the process must not end one worker after the other.
        unfinished = RejectedBundle(str(path), "bundle_invalid", INCOMPLETE_LOAD, actor="BUNDLE", time=utc_now())
        self._board.write(dataclasses.replace(state, link_fingerprint=seen, last_rejection=unfinished))
        self._decide(path, actor="BUNDLE")
        self._board.write(dataclasses.replace(self._board.read(), last_rejection=state.last_rejection))

    def _decide(self, path: Path, *, actor: str, allow: Collection[str] = (), version: str | None = None) -> None:
        """Load, check, note and exchange, or refuse. ``version`` is the one that has to be there, for going back."""
        self._follow()
        state, current = self._board.read(), self._served.get()
        try:
            if _version_at(path) == current.bundle.version and version in (None, current.bundle.version):
                return
            model = self._load(path, version=version)
            agreement, seen = self._checked(current, model, allow)
        except Problem as problem:
            self._refuse(state, path, problem, actor=actor)
            raise
        chosen = _chosen(model, path, actor=actor, agreement=agreement)
        try:
            self._board.write(dataclasses.replace(state, active=chosen, previous=state.active))
        except BaseException:  # a full disk: nobody would follow
            model.batcher.close()
            raise
        self._exchange(model, agreement, seen, outcome="rolled_back" if version else "activated", actor=actor)

    def _checked(
        self, current: LoadedModel, model: LoadedModel, allow: Collection[str]
    ) -> tuple[Agreement, list[RecentPrediction]]:
        """How far the two agree. Raises Problem, with ``model`` closed, where that is not enough."""
        try:
            agreement, seen = measure_agreement(current, model, self._served.recent_predictions)
            if problem := rejection_reason(current, model, agreement, min_agreement=self._settings.min_agreement, allow=allow):
                raise problem
        except BaseException:
            model.batcher.close()
            raise
        return agreement, seen

    def _load(self, path: Path, *, version: str | None = None) -> LoadedModel:
        """The model of the bundle at ``path``, checked as at a start. Raises Problem."""
        try:
            if version and _version_at(path) != version:
                raise BundleError(f"{path} holds another bundle by now than the one with the version {version}.")
            served = self._served
            return load_model(self._settings, allocate_resources(self._settings), served.metrics, served.decoder, path=path)
        except UserError as error:
            raise Problem("bundle_invalid", str(error)).without_traceback() from None
        except Exception as error:
            log.exception("loading failed")
            raise Problem("bundle_invalid", f"The bundle {path} could not be loaded: {error!r}").without_traceback() from None

    def _exchange(
        self, model: LoadedModel, agreement: Agreement, seen: list[RecentPrediction], *, outcome: str, actor: str
    ) -> None:
        previous = self._served.get().bundle.version
        self._served.metrics.rollouts.labels(outcome).inc()  # before anybody can see that it serves
        self._served.install(model, seen)
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

    def _refuse(self, state: RolloutState, path: Path, problem: Problem, *, actor: str) -> None:
        refusal = RejectedBundle(str(path), problem.code, problem.detail, actor=actor, time=utc_now())
        self._board.write(dataclasses.replace(state, last_rejection=refusal))
        self._served.metrics.rollouts.labels("rejected").inc()
        log.warning("rejected", extra={"bundle": str(path), "code": problem.code, "reason": problem.detail, "actor": actor})

    def _inside(self, bundle: str) -> Path:
        """The folder that is meant, links followed. Raises Problem for one that does not lie below BUNDLE_ROOT."""
        folder = self._settings.resolved_bundle_root
        try:
            path = (folder / bundle).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
            raise Problem("bundle_invalid", f"{bundle[:200]!r} cannot be looked up ({error}).") from None
        if not path.is_relative_to(folder) or path == folder:
            raise Problem(
                "bundle_invalid", f"{bundle[:200]!r} does not lie below {folder}; set BUNDLE_ROOT to the folder of bundles."
            )
        return path


def _version_at(path: Path) -> str:
    """The version of the bundle that lies at ``path`` now. Raises Problem."""
    try:
        return open_bundle(resolve_bundle(path), files=()).version
    except UserError as error:
        raise Problem("bundle_invalid", str(error)).without_traceback() from None
    except Exception as error:  # a manifest may hold anything, and a file system fail in any way
        raise Problem(
            "bundle_invalid", f"The bundle {str(path)[:200]} cannot be read: {repr(error)[:200]}"
        ).without_traceback() from None


def _chosen(model: LoadedModel, path: Path, *, actor: str, agreement: Agreement | None = None) -> SelectedBundle:
    return SelectedBundle(
        str(path),
        model.bundle.name,
        model.bundle.version,
        actor=actor,
        time=utc_now(),
        agreement=asdict(agreement) if agreement else None,
    )
