"""POST /gallery/review: somebody's decision about a photo, saved before the answer is given."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from urllib.parse import parse_qsl

from flask import Blueprint, Response, g, jsonify, redirect, request, url_for
from werkzeug.datastructures import MultiDict

from service.context import gallery, services
from service.db.filter import Filter, parse_filter
from service.gallery.photo import AUTO_ADVANCE_COOKIE, REVIEWER_COOKIE, RejectedReview, render_photo_page
from service.gallery.sidebar import open_query
from service.http.errors import Problem
from service.http.request_body import OTHER_VALUES, parse_json, read_body
from service.http.security import KEY_COOKIE, authenticate, require_key_or_cookie, require_same_origin
from service.http.text_validation import check_items, describe
from service.reviews.decisions import ReviewDecision, load_history, save_decision
from service.web.layout import ONE_YEAR_S, problem_page, problem_response

MAX_BODY_BYTES = 64 << 10
MAX_LENGTHS = {"note": 2_000, "reviewer": 80}
MAX_KEY = 1_000  # letters; a browser keeps no cookie of more than 4 KiB
NO_ADVANCE = ("note", "undo")  # after these nobody goes on to the next photo
SINGLE_LINE = frozenset({"reviewer", "key", "back"})
JSON_FORMAT = 'Send {"photo": ..., "sha256": ..., "decision": ...}.'
FIELDS = ("photo", "sha256", "model", "decision", "new_label", "note", "reviewer", "expected_version", "filter", "advance")

bp = Blueprint("review", __name__)


@bp.errorhandler(Problem)
def refuse(problem: Problem) -> Response:
    """In words on a page for a form, as problem+json for a program."""
    if request.method == "POST" and not request.is_json:
        return problem_page(problem)
    return problem_response(problem)


@bp.post("/gallery/review")
def review() -> Response:
    """Save a decision: a form goes on to a page (the next photo of the filter with ``advance``), JSON is answered with JSON.

    A form that is refused comes back on its photo's page, with what was typed in it and the reason.
    """
    require_same_origin(request)
    given = _fields()
    if request.is_json:
        return _review(given)
    try:
        return _review(given)
    except Problem as problem:
        if not (given.get("photo") and given.get("sha256")):
            raise
        with contextlib.suppress(Problem):  # of the page: the photo may be what is wrong
            return render_photo_page(
                _filter(given), given["photo"], given["sha256"], rejected=RejectedReview(_for_people(problem), given)
            )
        raise


def _review(given: dict[str, str]) -> Response:
    settings = services().settings
    g.key_name = require_key_or_cookie(request, settings)
    decision = _decision(given, key_name=g.key_name)
    here, following = _photo_page(given), _next(given, decision)  # before anything is saved: the filter may be no filter
    with gallery().database.write() as connection:
        id_ = save_decision(connection, decision)
    way = following and f"{following}&saved={id_}"
    if request.is_json:
        with gallery().database.read() as connection:
            rows = [entry_to_json(row) for row in load_history(connection, decision.sha256)]
        answer = jsonify(id=id_, history=rows, next=way)
    else:
        answer = redirect(way or f"{here}&saved={id_}", 303)  # type: ignore[assignment]
        if decision.decision not in NO_ADVANCE:
            _keep(answer, AUTO_ADVANCE_COOKIE, "1" if given.get("advance") == "1" else "0")
    if "reviewer" in given and g.key_name is None:
        _keep(answer, REVIEWER_COOKIE, decision.reviewer)
    answer.headers["Cache-Control"] = "no-store"
    return answer


@bp.post("/gallery/key")
def key() -> Response:
    """Take a key from a form into a cookie, and go back to the page that it came from."""
    settings = services().settings
    require_same_origin(request)
    _receive()
    if unknown := set(request.form) - {"key", "back"}:
        raise Problem("bad_parameter", f"The field {min(unknown)!r} is not known here; there are key and back.")
    if "key" not in request.form:
        raise Problem("bad_parameter", "The field `key` is missing; it is the key that decisions want.")
    check_items("field", request.form.items(multi=True), single_line=SINGLE_LINE)
    given = request.form.get("key", "").strip()
    if len(given) > MAX_KEY:
        raise Problem("bad_parameter", f"The field `key` has {len(given):,} letters; {MAX_KEY:,} is the most.")
    back = request.form.get("back", "")
    is_ours = back.startswith(("/gallery", "/compare")) and "//" not in back and "\\" not in back
    try:
        g.key_name = authenticate(given, settings) if given else None
    except Problem as problem:
        return problem_page(_for_people(problem, key=given), "gallery/key.html", back=back if is_ours else "")
    answer = redirect(request.script_root + back if is_ours else url_for("gallery.home"), 303)
    _keep(answer, KEY_COOKIE, given, max_age=None)  # type: ignore[arg-type]  # an empty key deletes the cookie
    answer.headers["Cache-Control"] = "no-store"
    return answer  # type: ignore[return-value]


@bp.get("/gallery/history.json")
def history_json() -> Response:
    """Everything that was said about a photo, the newest first; a page asks now and then for what others decided."""
    sha256 = request.args.get("sha256", "")
    with gallery().database.read() as connection:
        rows = [entry_to_json(row) for row in load_history(connection, sha256)]
    answer = jsonify(history=rows)
    answer.headers["Cache-Control"] = "no-cache"
    return answer


def entry_to_json(row: Any) -> dict[str, Any]:
    """A decision of a photo's history."""
    return {
        "id": row.id,
        "decision": row.decision,
        "new_label": row.new_label,
        "note": row.note,
        "reviewer": row.reviewer,
        "undoes": row.undoes,
        "decided_at": row.decided_at.isoformat(timespec="seconds"),
    }


def _receive() -> bytes:
    """Read the body before Flask parses it, as Flask would wait for a client that trickles. Raises Problem."""
    body = read_body(request, services().settings, max_bytes=MAX_BODY_BYTES, advice="Shorten the text.")
    request.environ["wsgi.input"] = io.BytesIO(body)
    return body


def _fields() -> dict[str, str]:
    """The fields, from a form or from JSON. Raises Problem."""
    body = _receive()
    if request.is_json:
        given = parse_json(body, max_values=OTHER_VALUES, hint=JSON_FORMAT)
        if not isinstance(given, dict):
            raise Problem("bad_json", f"The JSON is not an object. {JSON_FORMAT}")
        if nested := next((name for name, value in given.items() if isinstance(value, (list, dict))), None):
            raise Problem("bad_parameter", f"The field {nested[:40]!r} is {describe(given[nested])}; text is expected.")
        fields = {name: "" if value is None else str(value) for name, value in given.items()}
    else:
        fields = dict(request.form.items())
    check_items("field", fields.items(), single_line=SINGLE_LINE)
    for name in fields:
        if name not in FIELDS:
            raise Problem("bad_parameter", f"The field {name!r} is not known here; there are {', '.join(FIELDS)}.")
    decision, colon, label = fields.get("decision", "").partition(":")
    return fields | ({"decision": decision, "new_label": label} if colon else {})


def _decision(given: dict[str, str], *, key_name: str | None) -> ReviewDecision:
    for name in ("photo", "sha256", "decision"):
        if not given.get(name):
            raise Problem("bad_parameter", f"The field `{name}` is missing; it is wanted with every decision.")
    for name, most in MAX_LENGTHS.items():
        if len(given.get(name, "")) > most:
            raise Problem("bad_parameter", f"The field `{name}` has {len(given[name]):,} letters; {most:,} is the most.")
    expected_version = given.get("expected_version", "")
    if expected_version and not (expected_version.isascii() and expected_version.isdigit() and len(expected_version) < 19):
        raise Problem(
            "bad_parameter",
            f"The field `expected_version` is {expected_version!r}; expected the id of the current decision, or nothing.",
        )
    return ReviewDecision(
        photo=given["photo"],
        sha256=given["sha256"],
        model_version=given.get("model") or gallery().active_version or "",
        decision=given["decision"],
        new_label=given.get("new_label") or None,
        note=_plain(given.get("note", "")),
        reviewer=key_name or _plain(given.get("reviewer", request.cookies.get(REVIEWER_COOKIE, "")))[: MAX_LENGTHS["reviewer"]],
        key_name=key_name,
        expected_version=int(expected_version) if expected_version else None,
    )


def _next(given: dict[str, str], decision: ReviewDecision) -> str | None:
    """The page of the photo that follows in the filter, found before the decision may take this one out of it.

    Behind the last photo there is none: its own page says then that the filter is through.
    """
    if given.get("advance") != "1" or not given.get("filter") or decision.decision in NO_ADVANCE:
        return None
    filters = _filter(given)
    with open_query(filters) as found:
        _, _, following = found.neighbors(found.find(decision.photo, decision.sha256))
    if following is None:
        return f"{_photo_page(given)}&last=1"
    return f"{url_for('photo.page')}?{filters.query(photo=following.photo, sha256=following.sha256)}"


def _filter(given: dict[str, str]) -> Filter:
    """The filter that the decision was made under. The model of the decision is the filter's. Raises Problem."""
    asked = MultiDict(parse_qsl(given.get("filter", "")))
    return parse_filter(asked, model=given.get("model") or gallery().active_version or "")


def _photo_page(given: dict[str, str]) -> str:
    return f"{url_for('photo.page')}?{_filter(given).query(photo=given['photo'], sha256=given['sha256'])}"


def _keep(answer: Response, name: str, value: str, *, max_age: int | None = ONE_YEAR_S) -> None:
    """In a cookie that no script reads and no other site's page sends; an empty value is forgotten."""
    if value:
        answer.set_cookie(name, value, max_age=max_age, samesite="Strict", httponly=True, secure=request.is_secure)
    else:
        answer.delete_cookie(name, samesite="Strict", httponly=True, secure=request.is_secure)


def _for_people(problem: Problem, *, key: str = "") -> Problem:
    """What is said to a program of headers does not help in a form."""
    if problem.code != "unauthorized":
        return problem
    what = "That key is not one that is known here" if key else "Decisions want a key here"
    return Problem(problem.code, f"{what}; type yours into the field Key.", headers=problem.headers)


def _plain(text: str) -> str:
    """Without what no database takes, and with one kind of line's end."""
    return text.replace("\0", "").replace("\r\n", "\n").strip()
