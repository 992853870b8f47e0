"""A training run: its page, its state as JSON, server-sent events and its log; cancel and resume it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

from flask import Blueprint, Response, redirect, request, url_for

from models.errors import UserError
from service.context import gallery, services
from service.db.connection import Database
from service.db.training_jobs import cancel_job, get_job, list_jobs, resume_job
from service.http import CAN_STREAM, EVENT_STREAM
from service.http.errors import Problem
from service.rollout.state import RolloutStore
from service.settings import Settings
from service.studio.authorization import protect
from service.studio.estimates import estimate_run
from service.studio.fields import check_parameters, read_fields, uncached_json, wants_page
from service.studio.job_files import MAX_LOG_BYTES, JobFiles
from service.studio.job_state import METRICS, JobState, count_ahead, live_version
from service.studio.start_page import page
from service.studio.training_settings import FIELDS

LOG_LINES = 12  # last lines of the log on the page
KEEPALIVE_S = 10.0  # interval of comments in an idle stream, to notice clients that have gone
RETRY_MS = 2000  # delay before a browser connects again
MAX_STREAM_S = 3600.0

bp = protect(Blueprint("jobs", __name__, url_prefix="/studio/jobs"))


@bp.get("")
def all_json() -> Response:
    """Return all training runs, newest first, without their epochs."""
    states = [load.to_json() for load in load_states()]
    for state in states:
        del state["progress"]["history"], state["progress"]["changed"]
    return uncached_json({"jobs": states})


@bp.get("/<int:job>")
def show(job: int) -> Response:
    """Show a training run. Programs get JSON. With ``part=status`` only the part of the page that changes is returned."""
    check_parameters("part")
    state = load_state(job)
    if not wants_page():
        response = uncached_json(state.to_json())
        response.vary.add("Accept")
        return response
    if request.args.get("part") == "status":
        return page("studio/job_status.html", state=state, previous=previous_bundle())
    return render_job(state)


@bp.get("/<int:job>/log")
def log(job: int) -> Response:
    """Return the last MAX_LOG_BYTES of the log of a training run."""
    with gallery().database.read() as connection:
        files = JobFiles.of(services().settings, get_job(connection, job))
    text = files.read_log()
    return Response(text, headers={"Cache-Control": "no-store"}, content_type="text/plain; charset=utf-8")


@bp.get("/<int:job>/events")
def events(job: int) -> Response:
    """Send the state as a server-sent event whenever it changes, until the run has ended.

    A server that cannot pause a response sends one event and closes the connection. The browser then connects again, which
    is polling.
    """
    load_state(job)  # Problem if there is none
    environ, context = request.environ, services()
    can_pause = bool(environ.get(CAN_STREAM)) and request.method == "GET"
    if can_pause:
        environ[EVENT_STREAM] = True
    load = _loader(context.settings, gallery().database, context.rollout.store, job)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(_stream(load, can_pause=can_pause), headers=headers, content_type="text/event-stream")


@bp.post("/<int:job>/cancel")
def cancel(job: int) -> Response:
    read_fields({})
    with gallery().database.write() as connection:
        cancel_job(connection, job)
    return _changed(job)


@bp.post("/<int:job>/resume")
def resume(job: int) -> Response:
    """Return a failed or canceled run to the queue. It continues after its last finished epoch."""
    read_fields({})
    with gallery().database.write() as connection:
        resume_job(connection, job, max_queued=services().settings.studio_max_queued)
    return _changed(job)


def render_job(state: JobState, *, problem: Problem | None = None, difference: str = "") -> Response:
    """Return the page of a training run.

    Args:
        state: The run.
        problem: Why an action failed.
        difference: Which of the ``ALLOWED_DIFFERENCES`` kept the model from going live.
    """
    previous = previous_bundle()
    response = page(
        "studio/job.html",
        state=state,
        previous=previous,
        is_previous=previous is not None and previous["version"] == state.job.version,
        problem=problem,
        difference=difference,
        fields=FIELDS,
        metrics=METRICS,
        live_version=live_version(),
        max_log_kb=MAX_LOG_BYTES >> 10,
        log_lines=state.files.read_log().splitlines()[-LOG_LINES:],
    )
    response.vary.add("Accept")
    if problem:
        response.status_code = problem.status
    return response


def load_state(id_: int) -> JobState:
    """Return the state of a training run. Raises RecordNotFoundError."""
    context = services()
    return _loader(context.settings, gallery().database, context.rollout.store, id_)()


def load_states() -> list[JobState]:
    """Return the states of all training runs, newest first."""
    with gallery().database.read() as connection:
        jobs = list_jobs(connection)
    active, live = [job for job in jobs if job.is_active], live_version()
    settings = services().settings
    return [JobState.of(settings, job, live_version=live, ahead=count_ahead(active, job)) for job in jobs]


def previous_bundle() -> dict[str, str] | None:
    """Return the name and version of the bundle that a rollback serves again."""
    previous = services().rollout.store.read().previous
    return {"name": previous.name, "version": previous.version} if previous else None


def _loader(settings: Settings, database: Database, store: RolloutStore, id_: int) -> Callable[[], JobState]:
    """Return a function that loads the state of a run outside of the request."""
    with database.read() as connection:
        started = get_job(connection, id_)
    estimate = estimate_run(started.settings, started.data) if started.is_active else None
    estimated_s = estimate.seconds if estimate else None

    def load() -> JobState:
        with database.read() as connection:
            job = get_job(connection, id_)
            active = list_jobs(connection, "queued", "running") if job.state == "queued" else []
        live = store.read().active
        version = live.version if live else None
        return JobState.of(settings, job, live_version=version, ahead=count_ahead(active, job), estimated_s=estimated_s)

    return load


def _stream(load: Callable[[], JobState], *, can_pause: bool) -> Iterator[str]:
    """Yield the state whenever it changes. Between two chunks the server pauses."""
    yield f"retry: {RETRY_MS}\n\n"
    sent, began = "", time.monotonic()
    spoke_at = began
    while True:
        try:
            state = load()
        except UserError:  # deleted, or the database is not available: the client connects again
            return
        now = time.monotonic()
        if state.tag != sent:
            sent, spoke_at = state.tag, now
            yield f"event: state\nid: {state.tag}\ndata: {json.dumps(state.to_json())}\n\n"
            if not state.job.is_active:
                yield "event: end\ndata: {}\n\n"
        elif now - spoke_at > KEEPALIVE_S:
            spoke_at = now
            yield ": waiting\n\n"
        else:
            yield ""
        if not can_pause or not state.job.is_active or now - began > MAX_STREAM_S:
            return


def _changed(id_: int) -> Response:
    if wants_page():
        return redirect(url_for("jobs.show", job=id_), 303)  # type: ignore[return-value]
    return uncached_json(load_state(id_).to_json())
