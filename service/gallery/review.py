"""POST /gallery/review: somebody's decision about a photo, saved before the answer is given."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from flask import Blueprint, Response, current_app, g, jsonify, redirect, request, url_for
from werkzeug.datastructures import MultiDict

from service.filters import read_filter
from service.gallery.asking import listing
from service.gallery.core import gallery
from service.problems import Problem
from service.security import KEY_COOKIE, name_of_key, require_key_or_cookie, require_same_site
from service.settings import Settings
from service.site import YEAR_S
from service.store.reviewing import Verdict, decide, history

NAME = "reviewer"
MOST_BYTES = 64 << 10
TEXTS = {"note": 2_000, "reviewer": 80}
WORDS = ("label", "neither", "bad", "note", "undo")
FIELDS = ("photo", "sha256", "model", "decision", "new_label", "note", "reviewer", "seen", "filter", "next")

bp = Blueprint("review", __name__)


@bp.post("/gallery/review")
def review() -> Response:
    """Save a decision: a form goes on to a page (the next photo of the filter with ``next``), JSON is answered with JSON."""
    settings: Settings = current_app.extensions["settings"]
    require_same_site(request)
    g.key_name = require_key_or_cookie(request, settings)
    given = _fields()
    verdict = _verdict(given, key_name=g.key_name)
    following = _next(given, verdict)
    with gallery().database.write() as connection:
        id_ = decide(connection, verdict)
    if request.is_json:
        with gallery().database.read() as connection:
            rows = [as_entry(row) for row in history(connection, verdict.sha256)]
        answer = jsonify(id=id_, history=rows, next=following)
    else:
        answer = redirect(following or _photo_page(given, verdict.photo, verdict.sha256), 303)  # type: ignore[assignment]
    if given.get("reviewer"):
        secure = request.is_secure
        answer.set_cookie(NAME, verdict.reviewer, max_age=YEAR_S, samesite="Strict", httponly=True, secure=secure)
    answer.headers["Cache-Control"] = "no-store"
    return answer


@bp.post("/gallery/key")
def key() -> Response:
    """Take a key from a form into a cookie, and go back to the page that it came from."""
    settings: Settings = current_app.extensions["settings"]
    require_same_site(request)
    request.max_content_length = MOST_BYTES
    given = request.form.get("key", "").strip()
    g.key_name = name_of_key(given, settings)
    back = request.form.get("back", "")
    is_ours = back.startswith(("/gallery", "/compare")) and "//" not in back and "\\" not in back
    answer = redirect(request.script_root + back if is_ours else url_for("gallery.home"), 303)
    answer.set_cookie(KEY_COOKIE, given, samesite="Strict", httponly=True, secure=request.is_secure)
    answer.headers["Cache-Control"] = "no-store"
    return answer  # type: ignore[return-value]


@bp.get("/gallery/history.json")
def history_json() -> Response:
    """Everything that was said about a photo, the newest first; a page asks now and then for what others decided."""
    sha256 = request.args.get("sha256", "")
    with gallery().database.read() as connection:
        rows = [as_entry(row) for row in history(connection, sha256)]
    answer = jsonify(history=rows)
    answer.headers["Cache-Control"] = "no-cache"
    return answer


def as_entry(row: Any) -> dict[str, Any]:
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


def _fields() -> dict[str, str]:
    """The fields, from a form or from JSON. Raises Problem."""
    request.max_content_length = MOST_BYTES
    if request.is_json:
        given = request.get_json(silent=True)
        if not isinstance(given, dict):
            raise Problem("bad_json", 'The JSON is no object; send {"photo": ..., "sha256": ..., "decision": ...}.')
        fields = {name: "" if value is None else str(value) for name, value in given.items()}
    else:
        fields = dict(request.form.items())
    for name in fields:
        if name not in FIELDS:
            raise Problem("bad_parameter", f"The field {name!r} is not known here; there are {', '.join(FIELDS)}.")
    return fields


def _verdict(given: dict[str, str], *, key_name: str | None) -> Verdict:
    for name in ("photo", "sha256", "decision"):
        if not given.get(name):
            raise Problem("bad_parameter", f"The field `{name}` is missing; it is wanted with every decision.")
    decision = given["decision"]
    if decision not in WORDS:
        raise Problem("bad_parameter", f"The field `decision` is {decision!r}; it can be {', '.join(WORDS)}.")
    for name, most in TEXTS.items():
        if len(given.get(name, "")) > most:
            raise Problem("bad_parameter", f"The field `{name}` has {len(given[name]):,} letters; {most:,} is the most.")
    if decision == "note" and not given.get("note", "").strip():
        raise Problem("bad_parameter", "The field `note` is empty; a note was to be saved.")
    version = given.get("model") or gallery().version or ""
    new_label = given.get("new_label") or None
    if decision == "label":
        _check_class(version, new_label)
    seen = given.get("seen", "")
    if seen and not (seen.isascii() and seen.isdigit() and len(seen) < 19):
        raise Problem("bad_parameter", f"The field `seen` is {seen!r}; the seen decision's id is wanted, or nothing.")
    return Verdict(
        photo=given["photo"],
        sha256=given["sha256"],
        model_version=version,
        decision=decision,
        new_label=new_label,
        note=_plain(given.get("note", "")),
        reviewer=key_name or _plain(given.get("reviewer", "") or request.cookies.get(NAME, ""))[: TEXTS["reviewer"]],
        key_name=key_name,
        seen=int(seen) if seen else None,
    )


def _check_class(version: str, new_label: str | None) -> None:
    """Raises Problem for a label that is none of the model's classes."""
    from service.store.listing import find_model

    with gallery().database.read() as connection:
        classes = find_model(connection, version).classes
    if new_label not in classes:
        raise Problem("bad_parameter", f"The field `new_label` is {new_label!r}; it can be {', '.join(classes)}.")


def _next(given: dict[str, str], verdict: Verdict) -> str | None:
    """The page of the photo that follows in the filter, found before the decision may take this one out of it."""
    if given.get("next") != "1" or not given.get("filter"):
        return None
    wanted = read_filter(MultiDict(parse_qsl(given["filter"])), model=verdict.model_version)
    with listing(wanted) as found:
        _, _, following = found.around(found.find(verdict.photo, verdict.sha256))
    if following is None:
        return f"{url_for('gallery.photos')}?{wanted.query()}"
    return f"{url_for('photo.page')}?{wanted.query(photo=following.photo, sha256=following.sha256)}"


def _photo_page(given: dict[str, str], photo: str, sha256: str) -> str:
    wanted = read_filter(MultiDict(parse_qsl(given.get("filter", ""))), model=given.get("model") or gallery().version or "")
    return f"{url_for('photo.page')}?{wanted.query(photo=photo, sha256=sha256)}"


def _plain(text: str) -> str:
    """Without what no database takes, and with one kind of line's end."""
    return text.replace("\0", "").replace("\r\n", "\n").strip()
