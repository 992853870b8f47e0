"""Who may change something in the studio: same-origin requests, with a key if the server has keys."""

from __future__ import annotations

from flask import Blueprint, Response, g, request, url_for

from service.context import services
from service.http.errors import Problem
from service.http.security import require_same_origin, require_studio_key
from service.studio.fields import wants_page
from service.web.layout import problem_page, problem_response

READING = ("GET", "HEAD", "OPTIONS")


def protect(blueprint: Blueprint) -> Blueprint:
    """Require a same-origin request and a key for every change, and let a browser without a key sign in."""
    blueprint.before_request(_check_change)
    blueprint.register_error_handler(Problem, show_problem)
    return blueprint


def _check_change() -> None:
    if request.method not in READING:
        require_same_origin(request)
        g.key_name = require_studio_key(request, services().settings)


def show_problem(problem: Problem) -> Response:
    """Return problem+json, or a page: for a missing key the one on which to enter it."""
    if problem.code != "unauthorized" or not wants_page():
        return problem_response(problem)
    problem = Problem(problem.code, "Sign in with a key to change data, train or put a model live.", headers=problem.headers)
    return problem_page(problem, "gallery/key.html", back=page_before())


def page_before() -> str:
    """Return the path of the studio's page from which the request came, or of its start page."""
    referrer, start = request.referrer or "", url_for("studio.start")
    root = request.host_url.rstrip("/")
    own = referrer.removeprefix(root) if referrer.startswith(f"{root}/") else ""
    return (own if own.startswith(start) else start).removeprefix(request.script_root)
