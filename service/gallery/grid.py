"""The gallery's listing pages: the queues to begin with, and one grid behind them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response, redirect, render_template, request

from models.artifacts.statistics import wilson_interval
from service.context import gallery, image_access, services
from service.db.aggregates import FacetCounts
from service.db.errors import InvalidFilterError
from service.db.facets import has_groups
from service.db.filter import Filter, describe_filter, parse_page
from service.db.query import PredictionQuery, count_unreviewed_production, get_model
from service.db.records import PredictionRecord
from service.gallery import sidebar
from service.gallery.commands import find_bundle, retrain_command
from service.gallery.queues import QueuePreview, most_confident, production_queue, review_queues
from service.gallery.sidebar import grid_url, open_query, page_filter_from_request, photo_url
from service.http.errors import Problem, problem_from
from service.web.layout import percent, problem_page, record_problem

QUEUE_PREVIEW_SIZE = 8  # a queue's row

bp = Blueprint("gallery", __name__)
bp.register_error_handler(Problem, problem_page)


@bp.get("/gallery")
def home() -> Response:
    for name in request.args:
        if name != "model":
            raise Problem("bad_parameter", f'Unknown parameter "{name}". The only parameter is model, the version of a model.')
    version = request.args.get("model") or gallery().active_version or ""
    with gallery().database.read() as connection:
        everything = PredictionQuery(connection, Filter(model=version))
        model = everything.model

        def counts_of(**values: tuple[str, ...]) -> FacetCounts:
            filters = everything.filters.replace(**values)
            return PredictionQuery(connection, filters, same_model_as=everything).counts

        evaluated = counts_of(sources=("evaluation", "out-of-fold"))
        production = counts_of(sources=("production",)).facets["outcome"]
        unlabeled = counts_of(outcomes=("unlabeled",), reviews=("unreviewed",)).total
        is_weak = evaluated.total > 0 and not evaluated.can_judge_labels
        queues = [queue for queue in review_queues(version) if not (is_weak and "mislabeled" in queue.filters.flags)]
        previews = [QueuePreview.load(queue, everything, size=QUEUE_PREVIEW_SIZE) for queue in queues]
        models = gallery().models(connection)
        in_groups = has_groups(connection, model.id)
        unreviewed = count_unreviewed_production(connection)
        for other in models:
            if other.version != version and other.id in unreviewed:
                photos_of_other = PredictionQuery(connection, Filter(model=other.version))
                previews.append(QueuePreview.load(production_queue(other), photos_of_other, size=QUEUE_PREVIEW_SIZE))
    bundle = find_bundle(version)
    has_extra_data = bool(production["correct"] or production["incorrect"])
    return render_gallery(
        "gallery/home.html",
        model_shown=model,
        previews=previews,
        counts=everything.counts,
        evaluated=evaluated.facets["outcome"],
        production=production,
        unlabeled=unlabeled,
        is_weak=is_weak,
        has_groups=in_groups,
        by_class=[(name, everything.counts.facets["predicted"][name], most_confident(version, name)) for name in model.classes],
        models=models,
        served=gallery().active_version,
        everything=everything.filters,
        train=retrain_command(bundle, has_extra_data=has_extra_data) if bundle else None,
        has_extra_data=has_extra_data,
        trouble=_trouble([photo for preview in previews for photo in preview.photos]),
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


def _grid(**preset: tuple[str, ...]) -> Response:
    """Render the grid. ``/gallery/correct`` and ``/gallery/incorrect`` preset a filter.

    An invalid range of confidence is reported next to its fields, and the grid is shown without that range.
    """
    filters = page_filter_from_request(**preset)
    refused: Problem | None = None
    try:
        filters = sidebar.apply_range_params(filters, request.args)
    except (Problem, InvalidFilterError) as error:
        refused = problem_from(error.with_traceback(None))
    if not refused and any(name in request.args for name in sidebar.FORM_PARAMS):
        return redirect(grid_url(filters))  # type: ignore[return-value]
    number = parse_page(request.args)
    with open_query(filters) as found:
        if number > found.page_count:
            return redirect(grid_url(filters, page=found.page_count))  # type: ignore[return-value]
        page = found.page(number)
        column_facets = sidebar.build_column_facets(filters, found)
    vs_name = _name_of(filters.baseline)
    total = found.counts.total
    ends = [str(end) for end in filters.confidence]
    answer = render_gallery(
        "gallery/photos.html",
        filters=filters,
        model_shown=found.model,
        served=gallery().active_version,
        description=describe_filter(filters, total, name=found.model.name, baseline_name=vs_name),
        total=total,
        known=found.model_total,
        photos=page,
        first=(number - 1) * filters.per_page + 1,
        page=number,
        pages=found.page_count,
        numbers=sidebar.page_numbers(number, found.page_count),
        page_address=lambda page: grid_url(filters, page=page),
        active=sidebar.active_filters(filters, vs_name),
        facets={facet.parameter: facet for facet in sidebar.build_facets(filters, found)},
        column_facets=column_facets,
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


def _interval(correct: int, total: int) -> str:
    """Format the confidence interval of an accuracy."""
    interval = wilson_interval(correct, total)
    return f"95% interval {percent(interval['low'])} to {percent(interval['high'])}"


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
            "Start the service with `DATA_DIR` set to the evaluated folder. Until then the gallery shows names, labels and "
            "probabilities."
        )
    problem = image_access().find_problem(evaluated[0].photo, evaluated[0].sha256)
    return problem.detail if problem else None
