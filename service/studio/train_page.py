"""The form that starts a training run, and the time that it will probably take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, g, jsonify, redirect, request, url_for

from models.artifacts.atomic_io import atomic_write
from models.artifacts.reviews import NOTE, Review, write_reviews
from models.artifacts.tuning_result import PRESETS, TUNING_FILE, default_tuning_dir, read_preset
from models.errors import ConfigError
from models.networks.spec import EPOCH_SETTINGS
from service.context import gallery, services, workspace
from service.db.training_jobs import FINISHED, TrainingJob, get_job, list_jobs, submit_job
from service.gallery.commands import find_bundle
from service.gallery.photo import REVIEWER_COOKIE
from service.http.errors import Problem
from service.reviews.decisions import ANONYMOUS, list_reviews
from service.studio.authorization import protect
from service.studio.data_source import DATASET, FOLDER, describe_data, resolve_data, resolve_table
from service.studio.estimates import Estimate, estimate_run, find_data_set_of
from service.studio.fields import check_parameters, read_fields, uncached_json, wants_page
from service.studio.findings import Audit
from service.studio.finetune_process import NOT_INSTALLED, is_installed
from service.studio.job_files import JobFiles
from service.studio.start_page import page
from service.studio.training_settings import (
    FIELDS,
    LOGISTIC_FIELDS,
    NETWORKS,
    RUN_NAME,
    UNFROZEN_FIELDS,
    form_values,
    parse_settings,
)

MAX_ACTOR = 80
MAX_NAME = 50
OTHER_NETWORK = "other_backbone"  # a text field next to the list of networks
# What the time depends on:
ESTIMATED = ("data", "backbone", OTHER_NETWORK, "head", *EPOCH_SETTINGS, *UNFROZEN_FIELDS, *LOGISTIC_FIELDS)

bp = protect(Blueprint("training", __name__, url_prefix="/studio"))


@bp.get("/train")
def form() -> Response:
    """Show the form, filled with the data of ``data``, the settings of the model ``version``, and those of a ``preset``."""
    check_parameters("data", "version", "preset", "reviews")
    values = {"backbone": "efficientnet_lite0", "data": request.args.get("data", "")}
    notes: list[str] = []
    if version := request.args.get("version"):
        values |= _values_of_model(version, notes)
    if preset := request.args.get("preset"):
        values |= _values_of_preset(preset, values["data"])
    if request.args.get("reviews") == "1":
        values["reviews"] = "1"
    return _form(values, notes=notes)


def _values_of_model(version: str, notes: list[str]) -> dict[str, str]:
    """Return the settings and the data of a model for the form. What the form does not contain is added to ``notes``."""
    with gallery().database.read() as connection:
        job = next((job for job in list_jobs(connection, FINISHED) if job.version == version), None)
    if job:
        return form_values(job.settings) | {"data": job.data}
    bundle = find_bundle(version)
    if bundle is None:
        notes.append("The bundle of this model is not on this machine, so that its settings are unknown.")
        return {}
    config = dict(bundle.manifest.get("provenance", {}).get("config", {}))
    notes += [
        f"Its {name.replace('_', ' ')} is not part of this form." for name in ("labels", "extra_data") if config.get(name)
    ]
    config.pop("labels", None)  # its path is that of another machine, or not below DATA_DIR
    data = {"data": FOLDER} if services().settings.data_dir else {}  # the evaluated folder
    return form_values(config) | {"backbone": bundle.backbone} | data


def _values_of_preset(preset: str, data: str) -> dict[str, str]:
    """Return the settings that ``finetune tune`` chose for the data. Raises Problem if it did not run."""
    presets = _presets(data)
    if preset not in presets:
        known = f"Valid presets: {', '.join(presets)}." if presets else "Run `finetune tune` on this data first."
        raise Problem("bad_parameter", f"There is no preset {preset[:40]!r} for this data. {known}")
    return form_values(presets[preset])


def _presets(data: str) -> dict[str, dict[str, Any]]:
    """Return the presets of the data that ``finetune tune`` has written in the working directory, if there are any."""
    try:
        file = default_tuning_dir(resolve_data(services().settings, data)) / TUNING_FILE
        return {preset: read_preset(file, preset) for preset in PRESETS} if file.is_file() else {}
    except ConfigError:
        return {}


@bp.get("/train/estimate.json")
def estimate_json() -> Response:
    """Estimate the time of a training run with the given data, network and settings."""
    check_parameters(*ESTIMATED)
    estimate = _estimate(request.args.to_dict())
    return uncached_json(seconds=estimate and round(estimate.seconds, 1), run=estimate and estimate.run)


@bp.post("/jobs")
def start() -> Response:
    """Append a training run to the queue. A browser is redirected to its page, a program gets its id."""
    if not is_installed():
        raise Problem("training_unavailable", NOT_INSTALLED)
    names = dict.fromkeys(("name", "data", "reviews", OTHER_NETWORK, *FIELDS), str)
    fields = read_fields(names)
    try:
        job = _submit(fields)
    except (ConfigError, Problem) as error:
        code = error.code if isinstance(error, Problem) else "bad_parameter"
        problem = error if isinstance(error, Problem) else Problem(code, str(error))
        if not wants_page():
            raise problem from None
        response = _form(fields, problem=problem)
        response.status_code = problem.status
        return response
    target = url_for("jobs.show", job=job.id)
    if wants_page():
        return redirect(target, 303)  # type: ignore[return-value]
    response = jsonify(id=job.id, run=job.run, page=target)
    response.status_code = 201
    response.headers["Location"] = target
    return response


def _submit(fields: Mapping[str, str]) -> TrainingJob:
    """Check a form and append its run to the queue. Raises ConfigError, Problem and JobQueueFullError."""
    settings = services().settings
    chosen = _parse_form(fields)
    data_dir = resolve_data(settings, fields["data"])
    if "labels" in chosen:
        resolve_table(data_dir, chosen["labels"])
    if audit := _audit(fields["data"]):
        chosen |= audit.accepted_settings
    name = fields["name"].strip()
    if name and not RUN_NAME.fullmatch(name):
        raise ConfigError("Name: use 1 to 60 letters, digits, - _ and ., and start with a letter or digit.")
    workspace().require_space(0)
    with gallery().database.write() as connection:
        reviews = _reviews(list_reviews(connection)) if fields["reviews"] == "1" else []
        run = name or _free_name(f"{data_dir.name}-{chosen['backbone']}", list_jobs(connection))
        if (workspace().runs / run).exists():
            raise ConfigError(f"Name: there is already a folder runs/{run}. Choose another name.")
        id_ = submit_job(
            connection,
            run=run,
            settings=chosen,
            data=fields["data"],
            reviews=len(reviews),
            actor=actor(),
            max_queued=settings.studio_max_queued,
        )
        job = get_job(connection, id_)
        if reviews:  # before the runner can see the job
            with atomic_write(JobFiles.of(settings, job).reviews) as temporary:
                temporary.write_bytes(write_reviews(reviews))
    return job


def _form(values: Mapping[str, str], *, problem: Problem | None = None, notes: list[str] | None = None) -> Response:
    settings = services().settings
    choices = {f"{DATASET}{name}": name for name in workspace().dataset_names()}
    if settings.data_dir:
        choices[FOLDER] = f"{settings.data_dir.name} (DATA_DIR)"
    if (data := values.get("data", "")) and data not in choices:
        choices[data] = describe_data(data)
    selected = data or next(iter(choices), "")
    audit = _audit(selected)
    with gallery().database.read() as connection:
        reviews = len(_reviews(list_reviews(connection)))
        waiting = len(list_jobs(connection, "queued", "running"))
    return page(
        "studio/train.html",
        values=values,
        fields=FIELDS,
        networks=NETWORKS,
        estimated=ESTIMATED,
        data_choices=choices,
        presets=_presets(selected),
        selected=selected,
        reviews=reviews,
        waiting=waiting,
        is_installed=is_installed(),
        not_installed=NOT_INSTALLED,
        estimate=_estimate(values),
        problem=problem,
        notes=[*(notes or []), *filter(None, [audit and audit.training_note])],
    )


def _estimate(values: Mapping[str, str]) -> Estimate | None:
    try:
        chosen = _parse_form(values)
    except ConfigError:  # the form explains it when it is sent
        return None
    return estimate_run(chosen, values.get("data", ""))


def _parse_form(values: Mapping[str, str]) -> dict[str, Any]:
    """Check the settings of a form, with the network of either field. Raises ConfigError."""
    network = values.get(OTHER_NETWORK, "").strip() or values.get("backbone", "")
    return parse_settings({name: values.get(name, "") for name in FIELDS} | {"backbone": network})


def _audit(data: str) -> Audit | None:
    """Return the last audit of a dataset of the studio."""
    data_set = find_data_set_of(data)
    return Audit.read(data_set) if data_set else None


def _reviews(rows: list[Review]) -> list[Review]:
    """Return the reviews that change a run: notes do not."""
    return [row for row in rows if row.decision != NOTE]


def _free_name(base: str, jobs: list[TrainingJob]) -> str:
    """Return ``base`` as the name of a run, with a number if there is such a run."""
    base = re.sub(r"[^A-Za-z0-9_.-]+", "-", base).strip("-._")[:MAX_NAME] or "run"
    used = {job.run for job in jobs} | {entry.name for entry in workspace().runs.iterdir()}
    name, number = base, 1
    while name in used:
        number += 1
        name = f"{base}-{number}"
    return name


def actor() -> str:
    """Return who makes a change: the name of the key, or the name that the browser's user entered in the gallery."""
    entered = request.cookies.get(REVIEWER_COOKIE, "").replace("\0", "").strip()[:MAX_ACTOR]
    return g.get("key_name") or entered or ANONYMOUS
