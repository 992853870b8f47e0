"""POST /gallery/review: save a reviewer's decision. The response is sent after the decision is on disk."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from urllib.parse import parse_qsl

from flask import Blueprint, Response, g, jsonify, redirect, request, url_for
from werkzeug.datastructures import MultiDict

from models.errors import UserError
from service.context import gallery, services
from service.db.filter import Filter, parse_filter
from service.gallery.photo import AUTO_ADVANCE_COOKIE, REVIEWER_COOKIE, RejectedReview, render_photo_page
from service.gallery.sidebar import open_query
from service.http.errors import Problem, problem_from
from service.http.request_body import OTHER_VALUES, parse_json, read_body
from service.http.security import KEY_COOKIE, match_key, require_key_or_cookie, require_same_origin
from service.http.text_validation import check_items, describe
from service.reviews.decisions import ReviewDecision, load_history, save_decision
from service.web.layout import ONE_YEAR_S, problem_page, problem_response

MAX_BODY_BYTES = 64 << 10
MAX_LENGTHS = {"note": 2_000, "reviewer": 80}
MAX_KEY_LENGTH = 1_000  # browsers do not store cookies of more than 4 KiB
NO_ADVANCE = ("note", "undo")  # these stay on the photo
SINGLE_LINE = frozenset({"reviewer", "key", "back"})
JSON_FORMAT = 'Send {"photo": ..., "sha256": ..., "decision": ...}.'
FIELDS = ("photo", "sha256", "model", "decision", "new_label", "note", "reviewer", "expected_version", "filter", "advance")

bp = Blueprint("review", __name__)


@bp.errorhandler(Problem)
def handle_problem(problem: Problem) -> Response:
    """Return a page for a form, and problem+json for JSON."""
    if request.method == "POST" and not request.is_json:
        return problem_page(problem)
    return problem_response(problem)


@bp.post("/gallery/review")
def review() -> Response:
    """Save a decision. A form is redirected to the next photo of its filter, or back to the photo; JSON returns JSON.

    A rejected form returns the photo's page with the reason and the entered values.
    """
    require_same_origin(request)
    fields = _read_fields()
    if request.is_json:
        return _review(fields)
    try:
        return _review(fields)
    except UserError as error:
        problem = problem_from(error)
        if problem is None or not (fields.get("photo") and fields.get("sha256")):
            raise
        if problem.code == "database_unavailable":
            return problem_page(problem, "gallery/not_saved.html", fields=fields)
        with contextlib.suppress(UserError):  # the page may not exist
            rejected = RejectedReview(reword_for_form(problem), fields)
            return render_photo_page(_filter(fields), fields["photo"], fields["sha256"], rejected=rejected)
        raise


def _review(fields: dict[str, str]) -> Response:
    settings = services().settings
    g.key_name = require_key_or_cookie(request, settings)
    decision = _decision(fields, key_name=g.key_name)
    photo_page, next_page = _photo_page(fields), _next_page(fields, decision)  # first: the filter may be invalid
    with gallery().database.write() as connection:
        id_ = save_decision(connection, decision)
    target = next_page and f"{next_page}&saved={id_}"
    if request.is_json:
        with gallery().database.read() as connection:
            rows = [entry_to_json(row) for row in load_history(connection, decision.sha256)]
        response = jsonify(id=id_, history=rows, next=target)
    else:
        response = redirect(target or f"{photo_page}&saved={id_}", 303)  # type: ignore[assignment]
        if decision.decision not in NO_ADVANCE:
            set_cookie(response, AUTO_ADVANCE_COOKIE, "1" if fields.get("advance") == "1" else "0")
    if "reviewer" in fields and g.key_name is None:
        set_cookie(response, REVIEWER_COOKIE, decision.reviewer)
    response.headers["Cache-Control"] = "no-store"
    return response


@bp.post("/gallery/key")
def key() -> Response:
    """Store the key of a form in a cookie, and return to the page of the form."""
    settings = services().settings
    require_same_origin(request)
    _read_body()
    if unknown := set(request.form) - {"key", "back"}:
        raise Problem("bad_parameter", f"Unknown field {min(unknown)!r}. Valid fields: key, back.")
    if "key" not in request.form:
        raise Problem("bad_parameter", "The field `key` is required.")
    check_items("field", request.form.items(multi=True), single_line=SINGLE_LINE)
    entered = request.form.get("key", "").strip()
    known = (*settings.api_keys, *settings.admin_keys) if settings.studio or settings.api_keys else ()
    if len(entered) > MAX_KEY_LENGTH:
        raise Problem("bad_parameter", f"`key` has {len(entered):,} characters. The limit is {MAX_KEY_LENGTH:,}.")
    back = request.form.get("back", "")
    is_own_page = back.startswith(("/gallery", "/compare", "/studio")) and "//" not in back and "\\" not in back
    try:
        g.key_name = match_key(known, entered) if entered else None
    except Problem as problem:
        return problem_page(reword_for_form(problem, key=entered), "gallery/key.html", back=back if is_own_page else "")
    response = redirect(request.script_root + back if is_own_page else url_for("gallery.home"), 303)
    set_cookie(response, KEY_COOKIE, entered, max_age=None)  # type: ignore[arg-type]  # an empty key deletes the cookie
    response.headers["Cache-Control"] = "no-store"
    return response  # type: ignore[return-value]


@bp.get("/gallery/history.json")
def history_json() -> Response:
    """Return a photo's history, the newest first. Open pages poll it for the decisions of others."""
    sha256 = request.args.get("sha256", "")
    with gallery().database.read() as connection:
        rows = [entry_to_json(row) for row in load_history(connection, sha256)]
    response = jsonify(history=rows)
    response.headers["Cache-Control"] = "no-cache"
    return response


def entry_to_json(row: Any) -> dict[str, Any]:
    """Convert an entry of a photo's history to JSON."""
    names = ("id", "decision", "new_label", "note", "reviewer", "undoes")
    return {name: getattr(row, name) for name in names} | {"decided_at": row.decided_at.isoformat(timespec="seconds")}


def _read_body() -> bytes:
    """Read the body before Flask parses it, as Flask would wait for a slow client."""
    body = read_body(request, services().settings, max_bytes=MAX_BODY_BYTES, advice="Shorten the text.")
    request.environ["wsgi.input"] = io.BytesIO(body)
    return body


def _read_fields() -> dict[str, str]:
    """Read the fields of a form or of JSON."""
    body = _read_body()
    if request.is_json:
        document = parse_json(body, max_values=OTHER_VALUES, hint=JSON_FORMAT)
        if not isinstance(document, dict):
            raise Problem("bad_json", f"The JSON is not an object. {JSON_FORMAT}")
        if nested := next((name for name, value in document.items() if isinstance(value, (list, dict))), None):
            raise Problem("bad_parameter", f"`{nested[:40]}` must be text (got {describe(document[nested])}).")
        fields = {name: "" if value is None else str(value) for name, value in document.items()}
    else:
        fields = dict(request.form.items())
    check_items("field", fields.items(), single_line=SINGLE_LINE)
    for name in fields:
        if name not in FIELDS:
            raise Problem("bad_parameter", f"Unknown field {name!r}. Valid fields: {', '.join(FIELDS)}.")
    decision, colon, label = fields.get("decision", "").partition(":")
    return fields | ({"decision": decision, "new_label": label} if colon else {})


def _decision(fields: dict[str, str], *, key_name: str | None) -> ReviewDecision:
    for name in ("photo", "sha256", "decision"):
        if not fields.get(name):
            raise Problem("bad_parameter", f"The field `{name}` is required.")
    for name, limit in MAX_LENGTHS.items():
        if len(fields.get(name, "")) > limit:
            raise Problem("bad_parameter", f"`{name}` has {len(fields[name]):,} characters. The limit is {limit:,}.")
    expected_version = fields.get("expected_version", "")
    if expected_version and not (expected_version.isascii() and expected_version.isdigit() and len(expected_version) < 19):
        raise Problem(
            "bad_parameter", f"`expected_version` must be the id of the current decision, or empty (got {expected_version!r})."
        )
    reviewer = clean_text(fields.get("reviewer", request.cookies.get(REVIEWER_COOKIE, "")))[: MAX_LENGTHS["reviewer"]]
    return ReviewDecision(
        photo=fields["photo"],
        sha256=fields["sha256"],
        model_version=fields.get("model") or gallery().active_version or "",
        decision=fields["decision"],
        new_label=fields.get("new_label") or None,
        note=clean_text(fields.get("note", "")),
        reviewer=key_name or reviewer,
        key_name=key_name,
        expected_version=int(expected_version) if expected_version else None,
    )


def _next_page(fields: dict[str, str], decision: ReviewDecision) -> str | None:
    """Return the page of the next photo without a review, looked up before the decision may remove this one from the filter.

    After the last photo this is the page of the photo itself, which says so.
    """
    if fields.get("advance") != "1" or not fields.get("filter") or decision.decision in NO_ADVANCE:
        return None
    filters = _filter(fields)
    with open_query(filters if filters.reviews else filters.replace(reviews=("unreviewed",))) as query:
        _, _, following = query.neighbors(query.find(decision.photo, decision.sha256))
    if following is None:
        return f"{_photo_page(fields)}&last=1"
    return f"{url_for('photo.page')}?{filters.query(photo=following.photo, sha256=following.sha256)}"


def _filter(fields: dict[str, str]) -> Filter:
    """Parse the filter of the page on which the decision was made."""
    params = MultiDict(parse_qsl(fields.get("filter", "")))
    return parse_filter(params, model=fields.get("model") or gallery().active_version or "")


def _photo_page(fields: dict[str, str]) -> str:
    return f"{url_for('photo.page')}?{_filter(fields).query(photo=fields['photo'], sha256=fields['sha256'])}"


def set_cookie(response: Response, name: str, value: str, *, max_age: int | None = ONE_YEAR_S) -> None:
    """Set a cookie that scripts cannot read and that is not sent from other sites. An empty value deletes it."""
    if value:
        response.set_cookie(name, value, max_age=max_age, samesite="Strict", httponly=True, secure=request.is_secure)
    else:
        response.delete_cookie(name, samesite="Strict", httponly=True, secure=request.is_secure)


def reword_for_form(problem: Problem, *, key: str = "") -> Problem:
    """Replace the message about HTTP headers of a missing or unknown key."""
    if problem.code != "unauthorized":
        return problem
    return Problem(problem.code, "Unknown API key." if key else "Sign in with a key to review.", headers=problem.headers)


def clean_text(text: str) -> str:
    """Remove NUL characters, which databases do not store, and normalize line ends."""
    return text.replace("\0", "").replace("\r\n", "\n").strip()
