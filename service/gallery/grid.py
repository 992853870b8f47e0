"""The gallery's listing pages: the queues to begin with, and one grid behind them all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, redirect, render_template, request, url_for
from sqlalchemy import Connection

from models.artifacts.statistics import wilson_interval
from service.context import gallery, image_access, services
from service.db.aggregates import FacetCounts
from service.db.errors import InvalidFilterError
from service.db.facets import ODD_FILE, has_groups
from service.db.filter import COLLAPSE, Filter, describe_filter, parse_page
from service.db.query import PredictionQuery, ViewVersion, count_unreviewed_production, get_model
from service.db.records import PredictionRecord
from service.gallery import sidebar
from service.gallery.commands import find_bundle, retrain_command
from service.gallery.review_queues import (
    QueuePreview,
    disagreement_queue,
    most_confident,
    odd_file_queue,
    production_queue,
    review_queues,
)
from service.gallery.sidebar import grid_url, open_query, page_filter_from_request, photo_url
from service.http.errors import Problem, problem_from
from service.http.security import require_key_or_cookie
from service.reviews.batch import REASONS, describe_left, summarize_batch
from service.web.layout import percent, problem_page, record_problem

QUEUE_PREVIEW_SIZE = 8  # a queue's row
QUEUES_BEFORE = 3  # queues that come before the ones that not every model has
MAX_COMPARED = 100_000  # photos of a model whose predictions the landing page compares with those of another one
MAX_CLASS_BUTTONS = 4  # with more classes the selected photos are labeled with a list
BATCH_PARAMS = ("batch", "left", "selected", "select")  # what was saved, and what is selected
DIGEST_DIGITS = 12  # digits of a photo's sha256 in an address

bp = Blueprint("gallery", __name__)
bp.register_error_handler(Problem, problem_page)


@dataclass(frozen=True)
class SavedBatch:
    """What the last review of many photos did, in words, and the batch to undo, if it can be."""

    text: str
    undo: int | None


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
        models = gallery().models(connection)
        in_groups = has_groups(connection, model.id)
        if any(value.column == ODD_FILE for value in everything.facet_values):
            queues.insert(QUEUES_BEFORE, odd_file_queue(version, everything.facet_values))
        others = [other for other in models if other.version != version and other.classes == model.classes]
        if others and everything.model_total <= MAX_COMPARED:
            queues.insert(QUEUES_BEFORE, disagreement_queue(version, others[0]))
        previews = [QueuePreview.load(queue, everything, size=QUEUE_PREVIEW_SIZE) for queue in queues]
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
        train_form=url_for("training.form", version=version, reviews=1) if services().settings.studio else None,
        has_extra_data=has_extra_data,
        has_map=bool(gallery().maps(version)),
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
    filters = page_filter_from_request(extra=BATCH_PARAMS, **preset)
    select = parse_select(request.args)
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
            params = {name: request.args.get(name) for name in BATCH_PARAMS}
            return redirect(grid_url(filters, page=found.page_count, **params))  # type: ignore[return-value]
        page = found.page(number)
        view = ViewVersion.load(found.connection)
        saved = load_saved_batch(found.connection, request.args)
        column_facets = sidebar.build_column_facets(filters, found)
        example = found.fetch_by_sha256([filters.similar]).get(filters.similar) if filters.similar else None
    vs_name = _name_of(filters.baseline)
    collapsed = filters.duplicates == COLLAPSE
    total = found.counts.total
    max_selected = services().settings.max_selected
    select = "" if select == "all" and total > max_selected else select
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
        select=select,
        selected={digest for digest in request.args.get("selected", "").split(",") if digest},
        select_url=lambda select: grid_url(filters, page=number, select=select),
        view=view,
        saved=saved,
        example=example,
        has_embeddings=bool(gallery().maps(found.model.version)),
        group_sizes=found.group_sizes,
        duplicates_url=lambda photo: grid_url(filters.replace(duplicates=photo.sha256)),
        collapse_url=grid_url(filters.replace(duplicates="" if collapsed else COLLAPSE)),
        collapsed=collapsed,
        everything_filter=Filter(model=filters.model),
        has_duplicates=collapsed or bool(gallery().duplicate_groups(found.model.version)),
        key=key_status(),
        max_class_buttons=MAX_CLASS_BUTTONS,
        max_selected=max_selected,
    )
    if refused:
        answer.status_code = refused.status
        answer.headers["Cache-Control"] = "no-store"
        record_problem(refused)
    return answer


def render_gallery(template: str, **context: Any) -> Response:
    shared = {
        "photo_url": photo_url,
        "grid_url": grid_url,
        "similar_url": lambda filters, photo: grid_url(Filter(model=filters.model, similar=photo.sha256), select="all"),
        "has_folder": bool(gallery().data_folders()),
        "merged_from": gallery().merged_from,
        "interval": _interval,
    }
    text = render_template(template, **shared, **context)
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")


def parse_select(params: Mapping[str, str]) -> str:
    """Return which photos of a grid are selected: ``page``, ``all`` or none. Raises Problem."""
    select = params.get("select", "")
    if select not in ("", "page", "all"):
        raise Problem("bad_parameter", f"Invalid `select`: {select[:40]!r}. Valid values: page, all.")
    return select


def load_saved_batch(connection: Connection, params: Mapping[str, str]) -> SavedBatch:
    """Describe the review of many photos that an address names: what was saved, and what was left as it was."""
    batch, summary = params.get("batch", ""), None
    if re.fullmatch(r"\d{1,18}", batch, re.ASCII):
        summary = summarize_batch(connection, int(batch))
    found = re.findall(r"(\w+):(\d{1,7})(?:,|$)", params.get("left", ""), re.ASCII)
    left = Counter({reason: int(count) for reason, count in found if reason in REASONS})
    texts = summary.text if summary else "", describe_left(left, left.total() + (summary.photos if summary else 0))
    return SavedBatch(" ".join(filter(None, texts)), summary.batch if summary and summary.can_undo else None)


def key_status() -> dict[str, Any]:
    """Return whether reviewing requires a key, and the name of the submitted one."""
    settings = services().settings
    try:
        return {"is_required": bool(settings.api_keys), "name": require_key_or_cookie(request, settings)}
    except Problem:
        return {"is_required": True, "name": None}


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
    evaluated = [photo for photo in photos if photo.source != "production"]
    if not evaluated:
        return None
    if not gallery().data_folders():
        return (
            "Start the service with `DATA_DIR` set to the evaluated folder. Until then the gallery shows names, labels and "
            "probabilities."
        )
    problem = image_access().find_problem(evaluated[0].photo, evaluated[0].sha256)
    return problem.detail if problem else None
