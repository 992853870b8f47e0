"""The runs: list and compare them, put one live, roll back, and delete one."""

from __future__ import annotations

from typing import Any

import yaml
from flask import Blueprint, Response, g, jsonify, redirect, request, url_for

from models.artifacts.paths import resolve_bundle
from models.networks.spec import LOGISTIC
from service.context import gallery, services
from service.db.training_jobs import FINISHED, delete_job, find_run
from service.http.errors import Problem
from service.http.security import require_admin_key_or_cookie
from service.rollout.agreement import ALLOWED_DIFFERENCES, IncompatibleBundle
from service.studio.authorization import protect
from service.studio.fields import check_parameters, read_fields, wants_page
from service.studio.job_files import JobFiles
from service.studio.job_pages import load_state, load_states, previous_bundle, render_job
from service.studio.job_state import METRICS, JobState, live_version
from service.studio.start_page import page
from service.studio.train_page import actor
from service.studio.training_settings import FIELDS

bp = protect(Blueprint("runs", __name__, url_prefix="/studio/runs"))


@bp.get("")
def show_all() -> Response:
    store = services().rollout.store.read()
    return page(
        "studio/runs.html", states=load_states(), live=store.active, previous=previous_bundle(), live_version=live_version()
    )


@bp.get("/compare")
def compare() -> Response:
    """Show two runs side by side: ``a`` and ``b`` are their names."""
    check_parameters("a", "b")
    names = [request.args.get("a", ""), request.args.get("b", "")]
    states = [state for name in names if (state := _find(name))] if all(names) else []
    return page("studio/compare_runs.html", names=names, all=load_states(), states=states, rows=_rows(states), metrics=METRICS)


@bp.post("/<run>/live")
def put_live(run: str) -> Response:
    """Put the model of a run live. It is compared with the active one first."""
    fields = read_fields({"expected_version": str, "allow": list})
    g.key_name = require_admin_key_or_cookie(request, services().settings)
    if unknown := set(fields["allow"]) - set(ALLOWED_DIFFERENCES):
        raise Problem("bad_parameter", f"Invalid `allow`: {min(unknown)!r}. Valid values: {', '.join(ALLOWED_DIFFERENCES)}.")
    state = _find(run)
    if state.job.state != FINISHED:
        raise Problem("job_conflict", f"Only a finished run can be put live, and {run} is not finished.")
    try:
        services().rollout.activate_folder(
            resolve_bundle(state.files.bundle).resolve(),
            actor=actor(),
            allow=fields["allow"],
            expected_version=fields["expected_version"] or None,
        )
    except IncompatibleBundle as problem:
        if not wants_page():
            raise
        reason = Problem(problem.code, problem.reason)
        return render_job(load_state(state.job.id), problem=reason, difference=problem.difference)
    except Problem as problem:
        if not wants_page():
            raise
        return render_job(load_state(state.job.id), problem=problem)
    return _moved(state.job.id)


@bp.post("/rollback")
def roll_back() -> Response:
    """Serve the model again that was live before."""
    fields = read_fields({"expected_version": str})
    g.key_name = require_admin_key_or_cookie(request, services().settings)
    services().rollout.roll_back(actor=actor(), expected_version=fields["expected_version"] or None)
    return _moved(None)


@bp.post("/<run>/delete")
def delete(run: str) -> Response:
    """Delete a run with its bundle, log and progress. Its predictions stay in the gallery."""
    read_fields({})
    state = services().rollout.store.read()
    with gallery().database.write() as connection:
        job = find_run(connection, run)
        for selected, text in ((state.active, "is live"), (state.previous, "is the one that a rollback serves again")):
            if job.version and selected and selected.version == job.version:
                raise Problem("job_conflict", f"The model of {run} {text}, and cannot be deleted. Put another one live first.")
        delete_job(connection, job.id)
    JobFiles.of(services().settings, job).delete()
    if not wants_page():
        return jsonify(deleted=run)
    return redirect(url_for("runs.show_all"), 303)  # type: ignore[return-value]


def _find(run: str) -> JobState:
    with gallery().database.read() as connection:
        id_ = find_run(connection, run).id
    return load_state(id_)


def _rows(states: list[JobState]) -> list[tuple[str, list[str], bool]]:
    """Return the settings of two runs: a name, both values, and whether they differ."""
    if len(states) != 2:
        return []
    shown: list[tuple[str, list[Any]]] = [("Data", [state.data for state in states])]
    shown.append(("Reviews", [state.job.reviews for state in states]))
    configs = [_config(state) for state in states]
    for name, field in FIELDS.items():
        shown.append((field.label, [config.get(name) for config in configs]))
    shown.append(("Training photos", [_count(state, "train") for state in states]))
    shown.append(("Validation photos", [_count(state, "valid") for state in states]))
    shown.append(("Best epoch", [_best_epoch(state) for state in states]))
    rows = [(label, [_text(value) for value in values]) for label, values in shown]
    return [(label, texts, texts[0] != texts[1]) for label, texts in rows]


def _config(state: JobState) -> dict[str, Any]:
    """Return the settings of a run with those of the recipe, or those of the form if it has not started."""
    try:
        values = yaml.safe_load((state.files.run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    return values if isinstance(values, dict) else state.job.settings


def _count(state: JobState, split: str) -> int | None:
    if not state.bundle:
        return None
    return sum(state.bundle.manifest["provenance"]["dataset"]["photos"][split].values())


def _best_epoch(state: JobState) -> int | None:
    """Return the best epoch of a finished run, or None for a logistic head, which has no epochs."""
    if not state.bundle or _config(state).get("head") == LOGISTIC:
        return None
    return int(state.bundle.manifest["provenance"]["best_epoch"])


def _text(value: Any) -> str:
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _moved(id_: int | None) -> Response:
    """Return the state of the rollout, or redirect to the page of the run."""
    state = services().rollout.store.read()
    if not wants_page():
        selected = {
            name: row and {"name": row.name, "version": row.version, "actor": row.actor, "time": row.time}
            for name, row in (("active", state.active), ("previous", state.previous))
        }
        return jsonify(selected)
    return redirect(url_for("runs.show_all") if id_ is None else url_for("jobs.show", job=id_), 303)  # type: ignore[return-value]
