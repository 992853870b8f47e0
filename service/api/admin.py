"""Serve /admin: show, replace and roll back the active bundle. Requires one of ADMIN_KEYS."""

from __future__ import annotations

import dataclasses
from typing import Any

from flask import Blueprint, Response, g, jsonify, request

from service.context import services
from service.http.errors import Problem
from service.http.request_body import OTHER_VALUES, parse_json, read_body
from service.http.security import key_from_request, match_key
from service.rollout.agreement import ALLOWED_DIFFERENCES
from service.rollout.state import load_selection

HINT = 'Send {"bundle": "FOLDER"}, optionally with "allow": ["classes", "disagreement"].'
MAX_BYTES = 64 << 10

bp = Blueprint("admin", __name__, url_prefix="/admin")


@bp.before_request
def require_admin_key() -> None:
    """Require a key in a header. Pages of other sites cannot send one: a form has no headers, and /admin allows no CORS."""
    settings = services().settings
    if not settings.admin_keys:
        raise Problem("admin_disabled", "Start the server with ADMIN_KEYS to enable /admin.")
    g.key_name = match_key(settings.admin_keys, key_from_request(request))


@bp.get("/bundle")
def bundle() -> Response:
    return _status()


@bp.post("/bundle")
def activate() -> Response:
    """Respond when this worker serves the bundle. The other workers follow as soon as they have loaded it."""
    folder, allow = _parse_body()
    services().rollout.activate(folder, actor=g.key_name, allow=allow)
    return _status()


@bp.post("/rollback")
def rollback() -> Response:
    services().rollout.roll_back(actor=g.key_name)
    return _status()


def _status() -> Response:
    settings = services().settings
    store = services().rollout.store
    state, worker_versions = store.read(), store.worker_versions()
    status = dataclasses.asdict(state)
    del status["link_fingerprint"]
    status["converged"] = state.active is not None and set(worker_versions.values()) == {state.active.version}
    saved = load_selection(settings)
    kept = saved[0].bundle if saved else str(settings.bundle.resolve())
    status["survives_restart"] = state.active is not None and state.active.bundle == kept
    status["workers"] = [{"pid": pid, "version": version} for pid, version in worker_versions.items()]
    response = jsonify(status)
    response.headers["Cache-Control"] = "no-store"
    return response


def _parse_body() -> tuple[str, list[str]]:
    """Return the bundle's folder and the differences to accept."""
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
