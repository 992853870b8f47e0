"""POST /gallery/reviews: save one decision about many photos of the grid in one transaction, or undo it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from flask import Blueprint, Response, g, jsonify, redirect, request
from sqlalchemy import Connection
from werkzeug.datastructures import MultiDict

from models.errors import UserError
from service.context import gallery, services
from service.db.errors import ReviewConflictError
from service.db.filter import Filter, describe_filter, parse_filter
from service.db.query import PredictionQuery, ViewVersion
from service.gallery.grid import DIGEST_DIGITS, render_gallery
from service.gallery.photo import REVIEWER_COOKIE
from service.gallery.review import MAX_LENGTHS, clean_text, handle_problem, reword_for_form
from service.gallery.sidebar import grid_url, open_query
from service.http.errors import Problem, problem_from
from service.http.request_body import OTHER_VALUES, parse_json, read_body
from service.http.security import require_key_or_cookie, require_same_origin
from service.http.text_validation import check_items, describe
from service.reviews.batch import (
    BATCH_DECISIONS,
    BatchDecision,
    BatchResult,
    LeftPhoto,
    SelectedPhoto,
    describe_left,
    save_batch,
    select_matching,
    summarize_batch,
    undo_batch,
)
from service.web.layout import problem_page

UNDO = "undo"
VALUES_PER_PHOTO = 8  # JSON values of a photo in a request, and some to spare
JSON_FORMAT = 'Send {"decision": ..., "photos": [{"photo": ..., "sha256": ..., "expected_version": ...}, ...]}.'
JSON_FIELDS = ("decision", "new_label", "photos", "filter", "total", "view", "batch", "model", "note", "reviewer")
FORM_FIELDS = ("decision", "new_label", "select", "all", "confirmed", "filter", "page", "view", "batch", "model")
PHOTO_FIELDS = {"photo", "sha256", "expected_version"}
QUESTIONS = {
    "keep": "Confirm the label of {}?",
    "predicted": "Label {} as predicted?",
    "label": "Label {} {}?",
    "neither": "Mark {} as none of the classes?",
    "bad": "Exclude {} from training?",
}
MAX_SHOWN = 96  # photos that a grid selects again

bp = Blueprint("batch_review", __name__)
bp.register_error_handler(Problem, handle_problem)


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A decision about selected photos, or about the ``total`` photos of a filter, or the undo of a batch."""

    decision: str
    new_label: str | None = None
    note: str = ""
    reviewer: str = ""
    photos: Sequence[SelectedPhoto] | None = None
    filters: Filter
    total: int | None = None
    view: ViewVersion = field(default_factory=ViewVersion)
    batch: int | None = None


@bp.post("/gallery/reviews")
def reviews() -> Response:
    """Save a decision about many photos. A form is redirected to its grid; JSON returns JSON."""
    require_same_origin(request)
    settings = services().settings
    advice = "Select fewer photos."
    body = read_body(request, settings, advice=advice)
    request.environ["wsgi.input"] = io.BytesIO(body)
    if request.is_json:
        g.key_name = require_key_or_cookie(request, settings)
        result = _save(_parse_json(body), g.key_name)
        response = jsonify(_to_json(result))
    else:
        try:
            g.key_name = require_key_or_cookie(request, settings)
            response = _answer_form()
        except UserError as error:
            problem = problem_from(error)
            if problem is None:
                raise
            return problem_page(reword_for_form(problem))
    response.headers["Cache-Control"] = "no-store"
    return response


def _answer_form() -> Response:
    check_items("field", request.form.items(multi=True))
    for name in request.form:
        if name not in FORM_FIELDS:
            raise Problem("bad_parameter", f"Unknown field {name!r}. Valid fields: {', '.join(FORM_FIELDS)}.")
    batch_request = _parse_form()
    if batch_request.total is not None and request.form.get("confirmed") != "1":
        return _question(batch_request)
    result = _save(batch_request, g.key_name)
    left = ",".join(f"{reason}:{count}" for reason, count in sorted(result.left_counts.items()))
    selected = ",".join(photo.sha256[:DIGEST_DIGITS] for photo in result.left[:MAX_SHOWN] if photo.sha256)
    more = {"page": _number("page", request.form.get("page")) or 1, "batch": result.batch}
    return redirect(grid_url(batch_request.filters, **more, left=left or None, selected=selected or None), 303)  # type: ignore[return-value]


def _save(batch_request: BatchRequest, key_name: str | None) -> BatchResult:
    """Save a decision or an undo in one transaction.

    Raises:
        Problem: Too many photos are selected, or none.
        ReviewConflictError: More photos match the filter than the reviewer confirmed.
    """
    reviewer = key_name or batch_request.reviewer
    if batch_request.decision == UNDO:
        if batch_request.batch is None:
            raise Problem("bad_parameter", "The field `batch` is required for an undo.")
        with gallery().database.write() as connection:
            return undo_batch(connection, batch_request.batch, reviewer=reviewer, key_name=key_name)
    decision = BatchDecision(
        model_version=batch_request.filters.model,
        decision=batch_request.decision,
        new_label=batch_request.new_label,
        note=batch_request.note,
        reviewer=reviewer,
        key_name=key_name,
    )
    with gallery().database.write() as connection:
        if batch_request.total is None:
            photos = batch_request.photos or []
            _check_count(len(photos))
            return save_batch(connection, decision, photos)
        return _save_matching(connection, decision, batch_request, batch_request.total)


def _save_matching(connection: Connection, decision: BatchDecision, batch_request: BatchRequest, total: int) -> BatchResult:
    query = PredictionQuery(connection, batch_request.filters, selector=gallery())
    _check_count(max(total, query.counts.total))
    photos = select_matching(query, batch_request.view)
    if len(photos) > total:
        raise ReviewConflictError(
            f"{len(photos):,} photos match the filter now, and {total:,} were confirmed. Check them, then confirm again."
        )
    result = save_batch(connection, decision, photos)
    gone = [LeftPhoto("", "", "reviewed")] * (total - len(photos))  # a review of someone else removed them from the filter
    return BatchResult(result.batch, result.saved, result.left + gone)


def _check_count(photos: int) -> None:
    limit = services().settings.max_selected
    if not photos:
        raise Problem("bad_parameter", "No photos are selected. Select at least one.")
    if photos > limit:
        raise Problem("selection_too_large", f"{photos:,} photos are selected, the limit is {limit:,}. Add a filter.")


def _question(batch_request: BatchRequest) -> Response:
    """Show the question that precedes a review of all photos of a filter."""
    if batch_request.decision not in BATCH_DECISIONS:
        raise Problem("bad_parameter", f"Invalid `decision`. Valid values: {', '.join((*BATCH_DECISIONS, UNDO))}.")
    with open_query(batch_request.filters) as query:
        total, model = query.counts.total, query.model
    _check_count(total)
    photos = f"{total:,} photo{'s' * (total != 1)}"
    return render_gallery(
        "gallery/confirm.html",
        model_shown=model,
        question=QUESTIONS[batch_request.decision].format(photos, batch_request.new_label),
        description=describe_filter(batch_request.filters, total, name=model.name),
        fields=[(name, value) for name, value in request.form.items(multi=True) if name not in ("all", "select")],
        total=total,
        back=grid_url(batch_request.filters, page=_number("page", request.form.get("page")) or 1, select="all"),
    )


def _parse_form() -> BatchRequest:
    form = request.form
    decision, colon, label = form.get("decision", "").partition(":")
    if not decision:
        raise Problem("bad_parameter", "Choose what the selected photos show.")
    model = form.get("model") or gallery().active_version or ""
    return BatchRequest(
        decision=decision,
        new_label=(label if colon else form.get("new_label")) or None,
        reviewer=_reviewer(request.cookies.get(REVIEWER_COOKIE, "")),
        photos=[_parse_selected(value) for value in form.getlist("select")],
        filters=parse_filter(MultiDict(parse_qsl(form.get("filter", ""))), model=model).replace(model=model),
        total=_number("all", form.get("all")),
        view=ViewVersion.parse(form["view"]) if form.get("view") else ViewVersion(),
        batch=_number("batch", form.get("batch")),
    )


def _parse_selected(value: str) -> SelectedPhoto:
    """Parse the value of a checkbox, VERSION:SHA256:PHOTO with an empty version for a photo without a review."""
    version, _, rest = value.partition(":")
    sha256, _, photo = rest.partition(":")
    if not photo:
        raise Problem("bad_parameter", f"`select` must be VERSION:SHA256:PHOTO (got {value[:40]!r}).")
    return SelectedPhoto(photo, sha256, _number("select", version))


def _parse_json(body: bytes) -> BatchRequest:
    limit = services().settings.max_selected
    size_hint = f"Select at most {limit:,} photos."
    document = parse_json(body, max_values=VALUES_PER_PHOTO * limit + OTHER_VALUES, hint=JSON_FORMAT, size_hint=size_hint)
    if not isinstance(document, dict):
        raise Problem("bad_json", f"The JSON is not an object. {JSON_FORMAT}")
    for name, value in document.items():
        if name not in JSON_FIELDS:
            raise Problem("bad_parameter", f"Unknown field {name[:40]!r}. Valid fields: {', '.join(JSON_FIELDS)}.")
        expected = list if name == "photos" else int if name in ("total", "batch") else str
        if not isinstance(value, expected) or isinstance(value, bool):
            kind = {list: "a list", int: "a whole number", str: "text"}[expected]
            raise Problem("bad_parameter", f"`{name}` must be {kind} (got {describe(value)}).")
    if not document.get("decision"):
        raise Problem("bad_parameter", "The field `decision` is required.")
    if document["decision"] != UNDO and ("photos" in document) == ("filter" in document):
        raise Problem("bad_parameter", "Send either `photos`, or `filter` with `total`.")
    if "filter" in document and "total" not in document:
        raise Problem("bad_parameter", "The field `total` is required: the number of photos that match `filter`.")
    for name, max_length in MAX_LENGTHS.items():
        if len(document.get(name, "")) > max_length:
            raise Problem("bad_parameter", f"`{name}` has {len(document[name]):,} characters. The limit is {max_length:,}.")
    numbers = {name: document.get(name) for name in ("total", "batch")}
    for name, number in numbers.items():
        if number is not None and not 0 <= number < 2**63:
            raise Problem("bad_parameter", f"`{name}` must be 0 or more (got {number}).")
    params = MultiDict(parse_qsl(document.get("filter", "")))
    model = document.get("model") or params.get("model") or gallery().active_version or ""
    return BatchRequest(
        decision=document["decision"],
        new_label=document.get("new_label") or None,
        note=clean_text(document.get("note", "")),
        reviewer=_reviewer(document.get("reviewer", "")),
        photos=[_parse_photo(photo) for photo in document.get("photos", [])],
        filters=parse_filter(params, model=model, extra=("page",)).replace(model=model),
        total=document["total"] if "filter" in document else None,
        view=ViewVersion.parse(document["view"]) if "view" in document else ViewVersion.unbounded(),
        batch=document.get("batch"),
    )


def _parse_photo(photo: Any) -> SelectedPhoto:
    names = isinstance(photo, dict) and set(photo)
    version = photo.get("expected_version") if isinstance(photo, dict) else None
    is_valid = names and {"photo", "sha256"} <= names <= PHOTO_FIELDS
    is_valid = is_valid and isinstance(photo["photo"], str) and isinstance(photo["sha256"], str)
    is_valid = is_valid and (version is None or (type(version) is int and 0 <= version < 2**63))
    if not is_valid:
        raise Problem("bad_parameter", f"An entry of `photos` is invalid ({describe(photo)}). {JSON_FORMAT}")
    return SelectedPhoto(photo["photo"], photo["sha256"], version)


def _number(name: str, text: str | None) -> int | None:
    """Parse a number of a form; None if it is empty or missing."""
    if not text:
        return None
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise Problem("bad_parameter", f"`{name}` must be a whole number (got {text[:40]!r}).")
    return int(text)


def _reviewer(name: str) -> str:
    return clean_text(name)[: MAX_LENGTHS["reviewer"]]


def _to_json(result: BatchResult) -> dict[str, Any]:
    with gallery().database.read() as connection:
        summary = summarize_batch(connection, result.batch) if result.batch is not None else None
    texts = [summary.text if summary else "", describe_left(result.left_counts, result.saved + len(result.left))]
    return {
        "batch": result.batch,
        "saved": result.saved,
        "left": [asdict(photo) for photo in result.left if photo.photo],
        "message": " ".join(filter(None, texts)),
    }
