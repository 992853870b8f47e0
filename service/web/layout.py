"""What all pages share: the way between them, the model they speak of, and files that a browser may keep for ever."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from flask import Blueprint, Response, g, render_template, request, url_for
from markupsafe import Markup, escape
from werkzeug.urls import iri_to_uri

from models.artifacts.atomic_io import sha256_of
from models.runtime.openvino_engine import Pixels
from service.api.predict import png_data_url
from service.context import services
from service.http.errors import PROBLEM_MEDIA_TYPE, Problem
from service.inference.model_manager import LoadedModel

ONE_YEAR_S = 365 * 24 * 3600
MIN_PROBABILITY = 1e-12
STATIC_FOLDER = Path(__file__).parents[1] / "static"
VERSION_DIGITS = 12  # of a static file's sha256

bp = Blueprint("site", __name__)


class NavigationLink(NamedTuple):
    """A link of the navigation: the endpoint that it leads to, and its name."""

    endpoint: str
    label: str


NAVIGATION = [
    NavigationLink("page.home", "Classify"),
    NavigationLink("gallery.home", "Gallery"),
    NavigationLink("compare.page", "Compare"),
    NavigationLink("page.model", "Model"),
    NavigationLink("docs.docs", "Docs"),
]


def current_model() -> LoadedModel:
    """The model; raises Problem while there is none."""
    served = services().model_manager
    return served.get()


def record_problem(problem: Problem) -> None:
    """Count a problem that is answered, and have the request's line in the log name it."""
    g.code = problem.without_traceback().code
    served = services().model_manager
    served.metrics.errors.labels(problem.code).inc()


def problem_response(problem: Problem) -> Response:
    """A problem for a program."""
    record_problem(problem)
    return Response(problem.to_json(g.request_id), problem.status, problem.headers, content_type=PROBLEM_MEDIA_TYPE)


def problem_page(problem: Problem, template: str = "problem.html", **context: Any) -> Response:
    """A problem in words on a page, counted and logged as the API's are. One that passes has the page asked for again."""
    record_problem(problem)
    refresh_s = problem.headers.get("Retry-After") if request.method in ("GET", "HEAD") else None
    text = render_template(template, problem=problem, refresh_s=refresh_s, way_back=_way_back(), **context)
    return Response(text, problem.status, {**problem.headers, "Cache-Control": "no-store"}, mimetype="text/html")


def _way_back() -> tuple[str, str] | None:
    """Address and words of a link to the page of this site that one came from, else to the gallery or the first page."""
    before = request.referrer or ""
    if before.startswith(request.host_url) and before != iri_to_uri(request.url):
        return before, "Back to the page before"
    here = request.script_root + request.full_path.removesuffix("?")
    gallery, home = url_for("gallery.home"), url_for("page.home")
    if here.startswith((gallery, url_for("compare.page"))) and here != gallery:
        return gallery, "To the gallery"
    return (home, "To the first page") if here != home else None


@bp.app_context_processor
def template_context() -> dict[str, Any]:
    """Names that every template knows."""
    try:
        served = current_model()
    except Problem:
        return {"navigation": NAVIGATION, "model": None}
    return {"navigation": NAVIGATION, "model": served.summary | {"merged_from": served.bundle.merged_from}}


@functools.cache
def static_versions() -> dict[str, str]:
    """Compute the version of every static file once, so that no request makes the server open a file by a client's name."""
    files = (file for file in STATIC_FOLDER.rglob("*") if file.is_file())
    return {file.relative_to(STATIC_FOLDER).as_posix(): sha256_of(file)[:VERSION_DIGITS] for file in files}


@bp.app_url_defaults
def add_version(endpoint: str, values: dict[str, Any]) -> None:
    """Add a static file's version to its address, which thereby changes with the file's content."""
    if endpoint == "static" and "v" not in values:
        values["v"] = static_versions()[values["filename"]]


@bp.after_app_request
def cache_static(response: Response) -> Response:
    """Let browsers cache a static file without end if its address names its version, and revalidate it otherwise."""
    if request.endpoint == "static" and request.method in ("GET", "HEAD") and response.status_code in (200, 304):
        version = static_versions().get((request.view_args or {})["filename"])
        if version is not None and request.args.get("v") == version:
            response.headers["Cache-Control"] = f"public, max-age={ONE_YEAR_S}, immutable"
    return response


@bp.app_template_filter("percent")
def percent(share: float, digits: int = 1) -> str:
    """0.992 -> 99.2 %. What is not quite all is not rounded up to 100 %, and what is not quite nothing not down to 0 %."""
    said, step = f"{share:.{digits}%}", 10**-digits
    if share > 0 and float(said[:-1]) == 0:
        said = f"<\u202f{step:.{digits}f}%"
    elif share < 1 and float(said[:-1]) == 100:
        said = f">\u202f{100 - step:.{digits}f}%"
    return said.replace("%", "\u202f%")


@bp.app_template_filter("probability")
def probability(value: float) -> str:
    """A model's probability. It is never quite 0 or 1, though it may be stored so, rounded."""
    return percent(min(max(value, MIN_PROBABILITY), 1 - MIN_PROBABILITY))


@bp.app_template_filter("code_spans")
def code_spans(text: str) -> Markup:
    """What stands between backticks as code; all of it is text, whoever wrote it."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@bp.app_template_filter("data_url")
def data_url(pixels: Pixels) -> str:
    """(H, W, C) uint8 -> a data: URL."""
    return png_data_url(pixels)
