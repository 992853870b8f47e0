"""The gallery's listing pages: the queues to begin with, and one grid behind them all."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, redirect, render_template, request

from models.artifacts.paths import resolve_bundle
from models.artifacts.statistics import wilson_interval
from models.errors import UserError
from service.context import gallery, image_access, services
from service.db.filter import Filter, describe_filter, parse_page
from service.db.query import PredictionQuery, PredictionRecord, get_model
from service.gallery import sidebar
from service.gallery.queues import ReviewQueue, review_queues
from service.gallery.sidebar import grid_url, open_query, page_filter_from_request, photo_url
from service.http.errors import Problem
from service.web.layout import current_model, problem_page, record_problem

QUEUE_PREVIEW_SIZE = 8  # a queue's row
TRAIN_FLAGS = ("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "lr_schedule", "seed")

bp = Blueprint("gallery", __name__)


@dataclass(frozen=True)
class QueuePreview:
    """A queue with its number of photos and the first of them."""

    queue: ReviewQueue
    total: int
    photos: list[PredictionRecord]


@bp.get("/gallery")
def home() -> Response:
    for name in request.args:
        if name != "model":
            raise Problem("bad_parameter", f"The parameter {name!r} is not known here; there is model, a model's version.")
    shown = gallery()
    database = shown.database
    version = request.args.get("model") or shown.active_version or ""
    with database.read() as connection:
        everything = PredictionQuery(connection, Filter(model=version))
        model = everything.model
        rows = []
        for queue in review_queues(version, model.classes):
            found = PredictionQuery(connection, queue.filters, same_model_as=everything)
            rows.append(QueuePreview(queue, found.counts.total, found.first(QUEUE_PREVIEW_SIZE)))
        evaluated, live = (
            PredictionQuery(connection, Filter(model=version, sources=sources), same_model_as=everything).counts.facets[
                "outcome"
            ]
            for sources in (("evaluation", "out-of-fold"), ("production",))
        )
        waiting = PredictionQuery(
            connection, Filter(model=version, outcomes=("unlabeled",), reviews=("unreviewed",)), same_model_as=everything
        )
        models = shown.models(connection)
    return render_gallery(
        "gallery/home.html",
        model_shown=model,
        rows=rows,
        counts=everything.counts,
        evaluated=evaluated,
        live=live,
        waiting=waiting,
        models=models,
        served=shown.active_version,
        everything=everything.filters,
        train=retrain_command(),
        trouble=_trouble([photo for row in rows for photo in row.photos]),
    )


@bp.get("/gallery/photos")
def photos() -> Response:
    return _grid()


@bp.get("/gallery/correct")
def correct() -> Response:
    return _grid(outcomes=("correct",))


@bp.get("/gallery/incorrect")
def incorrect() -> Response:
    return _grid(outcomes=("incorrect",))


@bp.errorhandler(Problem)
def say(problem: Problem) -> Response:
    return problem_page(problem)


def _grid(**preset: tuple[str, ...]) -> Response:
    """The grid under a filter. ``/gallery/correct`` and ``/gallery/incorrect`` are filters with a name.

    A range of confidence that is none is refused beside its fields, on the grid that there was.
    """
    filters = page_filter_from_request(**preset)
    refused: Problem | None = None
    try:
        filters = sidebar.apply_range_params(filters, request.args)
    except Problem as problem:
        refused = problem.without_traceback()
    if not refused and any(name in request.args for name in sidebar.FORM_PARAMS):
        return redirect(grid_url(filters))  # type: ignore[return-value]
    number = parse_page(request.args)
    with open_query(filters) as found:
        if number > found.page_count:
            return redirect(grid_url(filters, page=found.page_count))  # type: ignore[return-value]
        page = found.page(number)
    vs_name = _name_of(filters.baseline)
    total = found.counts.total
    ends = [str(end) for end in filters.confidence]
    answer = render_gallery(
        "gallery/photos.html",
        filters=filters,
        model_shown=found.model,
        served=gallery().active_version,
        said=describe_filter(filters, total, name=found.model.name, vs_name=vs_name),
        total=total,
        known=found.model_total,
        photos=page,
        first=(number - 1) * filters.per_page + 1,
        page=number,
        pages=found.page_count,
        numbers=sidebar.page_numbers(number, found.page_count),
        page_address=lambda page: grid_url(filters, page=page),
        active=sidebar.active_filters(filters, vs_name),
        facets={facet.parameter: facet for facet in sidebar.build_facets(filters, found.counts)},
        confusion=sidebar.build_confusion_matrix(filters, found),
        bars=sidebar.build_histogram(filters, found.counts),
        ends=[request.args.get(name, end) for name, end in zip(("min_confidence", "max_confidence"), ends, strict=True)],
        refused=refused,
        hidden=sidebar.hidden_fields,
        sorts=sidebar.sort_options(filters),
        sizes=sidebar.page_size_options(filters),
        everything=grid_url(filters.cleared_filters()),
        another=grid_url(filters.replace(sort="random", order=filters.order, seed=filters.seed + 1)),
        trouble=_trouble(page),
    )
    if refused:
        answer.status_code = refused.status
        answer.headers["Cache-Control"] = "no-store"
        record_problem(refused)
    return answer


def render_gallery(template: str, **context: Any) -> Response:
    settings = services().settings
    shared = {
        "photo_url": photo_url,
        "grid_url": grid_url,
        "has_folder": settings.data_dir is not None,
        "merged_from": gallery().merged_from,
        "interval": _interval,
    }
    text = render_template(template, **shared, **context)
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")


def _interval(right: int, judged: int) -> str:
    """What an accuracy on so many photos can mean."""
    found = wilson_interval(right, judged)
    return f"95\u202f% interval {100 * found['low']:.1f} to {100 * found['high']:.1f}\u202f%"


def _name_of(version: str) -> str:
    if not version:
        return ""
    with gallery().database.read() as connection:
        return get_model(connection, version).name


def _trouble(photos: Sequence[PredictionRecord]) -> str | None:
    """Why the first photo cannot be shown, if it cannot; where no folder is set, that goes for all of them."""
    settings = services().settings
    evaluated = [photo for photo in photos if photo.source != "production"]
    if not evaluated:
        return None
    if settings.data_dir is None:
        return (
            "No folder of photos is set. Start the service with DATA_DIR=FOLDER, the folder that was evaluated; until then the "
            "gallery shows names, labels and probabilities."
        )
    problem = image_access().find_problem(evaluated[0].photo, evaluated[0].sha256)
    return problem.detail if problem else None


def retrain_command() -> str:
    """What trains the served model again with the decisions, and as it was trained, so that they alone make the difference."""
    bundle = current_model().bundle
    config = bundle.manifest.get("provenance", {}).get("config", {})
    settings = [f"--{name.replace('_', '-')} {config[name]}" for name in TRAIN_FLAGS if config.get(name) is not None]
    settings += [f"--unfreeze {shlex.join(config['unfreeze'])}"] if config.get("unfreeze") else []
    settings += ["--augment"] if config.get("augment") else []
    given = " ".join(["--data-dir", _data(), "--backbone", bundle.backbone, *settings])
    return f"finetune train {given} --reviews reviews.csv --output-dir {_run()}"


def serve_both_command() -> str:
    """What serves the newly trained model, with the one that serves now beside it."""
    settings = services().settings
    now = current_model().bundle.path
    with contextlib.suppress(UserError):  # as the operator calls it, if that is still it
        now = settings.bundle if resolve_bundle(settings.bundle) == now else now
    return f"BUNDLE={_run()}/bundle EVALUATIONS={shlex.quote(str(now))} DATA_DIR={_data()} python -m service"


def _data() -> str:
    settings = services().settings
    return shlex.quote(str(settings.data_dir)) if settings.data_dir else "DATA"


def _run() -> str:
    return shlex.quote(f"runs/{current_model().bundle.name}-reviewed")
