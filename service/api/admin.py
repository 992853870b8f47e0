"""/admin: which bundle serves, another in its place, and back again. For those who have one of ADMIN_KEYS."""

from __future__ import annotations

import dataclasses
from typing import Any

from flask import Blueprint, Response, g, jsonify, request

from service.context import services
from service.http.errors import Problem
from service.http.request_body import OTHER_VALUES, parse_json, read_body
from service.http.security import key_from_request, match_key
from service.rollout.agreement import ALLOWED_DIFFERENCES

HINT = 'Send {"bundle": "FOLDER"}, optionally with "allow": ["classes", "disagreement"].'
MAX_BYTES = 64 << 10

bp = Blueprint("admin", __name__, url_prefix="/admin")


@bp.before_request
def require_admin_key() -> None:
    """Only with a key in a header, which no page of another origin can send: a form cannot, and CORS is not granted here."""
    settings = services().settings
    if not settings.admin_keys:
        raise Problem("admin_disabled", "This server was started without ADMIN_KEYS, so nobody may administer it; set them.")
    g.key_name = match_key(settings.admin_keys, key_from_request(request))


@bp.get("/bundle")
def bundle() -> Response:
    return _status()


@bp.post("/bundle")
def activate() -> Response:
    """Answers when this worker serves the bundle; the others follow within the time that loading takes."""
    wanted, allow = _asked_for()
    services().rollout.activate(wanted, actor=g.key_name, allow=allow)
    return _status()


@bp.post("/rollback")
def rollback() -> Response:
    services().rollout.roll_back(actor=g.key_name)
    return _status()


def _status() -> Response:
    settings = services().settings
    store = services().rollout.store
    state, worker_versions = store.read(), store.worker_versions()
    answer = dataclasses.asdict(state)
    del answer["link_fingerprint"]
    answer["converged"] = state.active is not None and set(worker_versions.values()) == {state.active.version}
    answer["survives_restart"] = state.active is not None and state.active.bundle == str(settings.bundle.resolve())
    answer["workers"] = [{"pid": pid, "version": version} for pid, version in worker_versions.items()]
    made = jsonify(answer)
    made.headers["Cache-Control"] = "no-store"
    return made


def _asked_for() -> tuple[str, list[str]]:
    settings = services().settings
    if request.mimetype != "application/json":
        raise Problem("unsupported_media_type", f"Unsupported Content-Type: {request.mimetype[:80] or 'none'}. {HINT}")
    body = read_body(request, settings, max_bytes=MAX_BYTES, advice=HINT)
    document: Any = parse_json(body, max_values=OTHER_VALUES, hint=HINT)
    if not isinstance(document, dict) or not isinstance(document.get("bundle"), str) or not document["bundle"]:
        raise Problem("bad_json", f"The JSON names no bundle. {HINT}")
    allow = document.get("allow", [])
    if not isinstance(allow, list) or not all(word in ALLOWED_DIFFERENCES for word in allow):
        raise Problem("bad_json", f"`allow` must be a list of {' and '.join(ALLOWED_DIFFERENCES)}. {HINT}")
    return document["bundle"], allow
