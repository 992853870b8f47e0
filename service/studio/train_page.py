"""The form that starts a training run, and the time that it will probably take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, g, jsonify, redirect, request, url_for

from models.artifacts.atomic_io import atomic_write
from models.artifacts.reviews import NOTE, Review, write_reviews
from models.errors import ConfigError
from service.context import gallery, services, workspace
from service.db.training_jobs import FINISHED, TrainingJob, get_job, list_jobs, submit_job
from service.gallery.commands import find_bundle
from service.gallery.photo import REVIEWER_COOKIE
from service.http.errors import Problem
from service.reviews.decisions import ANONYMOUS, list_reviews
from service.studio.access import protect
from service.studio.data_sets import DataSet
from service.studio.data_source import DATASET, FOLDER, describe_data, resolve_data
from service.studio.fields import check_parameters, read_fields, uncached_json
from service.studio.finetune_process import NOT_INSTALLED, is_installed
from service.studio.job_files import JobFiles
from service.studio.job_progress import estimate_s
from service.studio.start_page import page
from service.studio.training_settings import (
    EPOCH_FIELDS,
    FIELDS,
    NETWORKS,
    RUN_NAME,
    UNFROZEN_FIELDS,
    chosen_head,
    form_values,
    parse_settings,
)

MAX_ACTOR = 80
MAX_NAME = 50
OTHER_NETWORK = "other_backbone"  # a text field next to the list of networks
ESTIMATED = ("data", "backbone", OTHER_NETWORK, "head", *EPOCH_FIELDS, *UNFROZEN_FIELDS)  # what the time depends on

bp = protect(Blueprint("training", __name__, url_prefix="/studio"))


@dataclass(frozen=True)
class Estimate:
    """How long a training run will probably take, and the run that was measured."""

    seconds: float
    run: str


@bp.get("/train")
def form() -> Response:
    """Show the form, filled with the data of ``data``, or with the settings of the model ``version``."""
    check_parameters("data", "version", "reviews")
    values = {"backbone": "efficientnet_lite0", "data": request.args.get("data", "")}
    notes: list[str] = []
    if version := request.args.get("version"):
        values |= _values_of_model(version, notes)
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
    config = bundle.manifest.get("provenance", {}).get("config", {})
    notes += [
        f"Its {name.replace('_', ' ')} is not part of this form." for name in ("labels", "extra_data") if config.get(name)
    ]
    data = {"data": FOLDER} if services().settings.data_dir else {}  # the evaluated folder
    return form_values(config) | {"backbone": bundle.backbone} | data


@bp.get("/train/estimate.json")
def estimate_json() -> Response:
    """Estimate the time of a training run with the given data, network and settings."""
    check_parameters(*ESTIMATED)
    estimate = _estimate(request.args.to_dict())
    return uncached_json(seconds=estimate and round(estimate.seconds, 1), run=estimate and estimate.run)


@bp.post("/jobs")
def start() -> Response:
    """Append a training run to the queue. A form is redirected to its page, JSON gets its state."""
    if not is_installed():
        raise Problem("training_unavailable", NOT_INSTALLED)
    names = dict.fromkeys(("name", "data", "reviews", OTHER_NETWORK, *FIELDS), str)
    fields = read_fields(names)
    try:
        job = _submit(fields)
    except (ConfigError, Problem) as error:
        code = error.code if isinstance(error, Problem) else "bad_parameter"
        problem = error if isinstance(error, Problem) else Problem(code, str(error))
        if request.is_json:
            raise problem from None
        response = _form(fields, problem=problem)
        response.status_code = problem.status
        return response
    target = url_for("jobs.show", job=job.id)
    if not request.is_json:
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
        reviews=reviews,
        waiting=waiting,
        is_installed=is_installed(),
        not_installed=NOT_INSTALLED,
        estimate=_estimate(values),
        problem=problem,
        notes=notes or [],
    )


def _estimate(values: Mapping[str, str]) -> Estimate | None:
    """Estimate the time of a run from the last ones with the same network and head, on the same data if there is one."""
    try:
        chosen = _parse_form(values)
    except ConfigError:  # the form explains it when it is sent
        return None
    with gallery().database.read() as connection:
        finished = [job for job in list_jobs(connection, FINISHED) if job.speed]
    similar = [job for job in finished if _kind(job.settings) == _kind(chosen)]
    images = _count_images(values.get("data", ""))
    if not similar or not images:
        return None
    same = [job for job in similar if job.data == values.get("data")]
    measured = same[0] if same else max(similar, key=lambda job: (job.speed or {})["reading_s_per_image"])
    assert measured.speed
    return Estimate(estimate_s(measured.speed, images=images, epochs=chosen.get("epochs")), measured.run)


def _parse_form(values: Mapping[str, str]) -> dict[str, Any]:
    """Check the settings of a form, with the network of either field. Raises ConfigError."""
    network = values.get(OTHER_NETWORK, "").strip() or values.get("backbone", "")
    return parse_settings({name: values.get(name, "") for name in FIELDS} | {"backbone": network})


def _kind(settings: Mapping[str, Any]) -> tuple[Any, str, bool]:
    """Return what runs must have in common: network, head, and whether every epoch runs the complete network."""
    return settings.get("backbone"), chosen_head(settings), any(name in settings for name in UNFROZEN_FIELDS)


def _count_images(data: str) -> int | None:
    """Return the number of photos of a data set of the studio."""
    if not data.startswith(DATASET):
        return None
    try:
        return DataSet.find(workspace(), services().settings, data.removeprefix(DATASET)).usage()[1]
    except Problem:
        return None


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
