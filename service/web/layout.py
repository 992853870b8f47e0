"""What all pages share: the navigation, error pages, template filters, and cacheable addresses of static files."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from flask import Blueprint, Response, current_app, g, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from werkzeug.urls import iri_to_uri

from models.artifacts.atomic_io import sha256_of
from service.context import services
from service.http.errors import PROBLEM_MEDIA_TYPE, Problem
from service.http.security import KEY_COOKIE
from service.images.render import png_data_url
from service.inference.model_manager import LoadedModel

ONE_YEAR_S = 365 * 24 * 3600
MIN_PROBABILITY = 1e-12
STATIC_FOLDER = Path(__file__).parents[1] / "static"
VERSION_DIGITS = 12  # digits of a static file's sha256
MEDIA_TYPES = [PROBLEM_MEDIA_TYPE, "application/json", "text/html"]  # media types of a problem, the default first
TABLE = '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>'

bp = Blueprint("site", __name__)
bp.add_app_template_filter(png_data_url, "data_url")
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


class NavigationLink(NamedTuple):
    endpoint: str
    label: str


NAVIGATION = [
    NavigationLink("page.home", "Classify"),
    NavigationLink("gallery.home", "Gallery"),
    NavigationLink("compare.page", "Compare"),
    NavigationLink("page.model", "Model"),
    NavigationLink("docs.docs", "Docs"),
]
STUDIO_LINK = NavigationLink("studio.start", "Studio")


def current_model() -> LoadedModel:
    """Return the active model. Raises Problem while none is loaded."""
    return services().model_manager.get()


def record_problem(problem: Problem) -> None:
    """Count a problem and add its code to the request's log line."""
    g.code = problem.without_traceback().code
    services().model_manager.metrics.errors.labels(problem.code).inc()


def problem_response(problem: Problem) -> Response:
    """Return a problem as problem+json, or as a page if the client prefers HTML, and count it."""
    if bp.name in current_app.blueprints and request.accept_mimetypes.best_match(MEDIA_TYPES) == "text/html":
        return problem_page(problem)
    record_problem(problem)
    return Response(problem.to_json(g.request_id), problem.status, problem.headers, content_type=PROBLEM_MEDIA_TYPE)


def problem_page(problem: Problem, template: str = "problem.html", **context: Any) -> Response:
    """Return a problem as an HTML page, and count it.

    Args:
        problem: The problem. A page that failed with Retry-After reloads itself after that time.
        template: The page to show the problem on.
        **context: Further variables of the template.
    """
    record_problem(problem)
    refresh_s = problem.headers.get("Retry-After") if request.method in ("GET", "HEAD") else None
    text = render_template(template, problem=problem, refresh_s=refresh_s, back_link=_back_link(), **context)
    return Response(text, problem.status, {**problem.headers, "Cache-Control": "no-store"}, mimetype="text/html")


def _back_link() -> tuple[str, str] | None:
    """Return the address and text of a link to the previous page of this site, else to the gallery or the home page."""
    referrer = request.referrer or ""
    if referrer.startswith(request.host_url) and referrer != iri_to_uri(request.url):
        return referrer, "Go back"
    current = request.script_root + request.full_path.removesuffix("?")
    gallery, home = url_for("gallery.home"), url_for("page.home")
    if current.startswith((gallery, url_for("compare.page"))) and current != gallery:
        return gallery, "Back to the gallery"
    return (home, "Home") if current != home else None


@bp.app_context_processor
def template_context() -> dict[str, Any]:
    """Add the navigation, the active model and whether the browser has a key to the variables of every template."""
    navigation = [STUDIO_LINK, *NAVIGATION] if services().settings.studio else NAVIGATION
    context: dict[str, Any] = {"navigation": navigation, "model": None, "has_key": KEY_COOKIE in request.cookies}
    with contextlib.suppress(Problem):
        active = current_model()
        context["model"] = active.summary | {"merged_from": active.bundle.merged_from}
    return context


@bp.before_app_request
def redirect_trailing_slash() -> Response | None:
    """Redirect /gallery/ to /gallery, and likewise for all pages."""
    path = request.path.rstrip("/")
    if request.routing_exception is None or path == request.path or request.method not in ("GET", "HEAD"):
        return None
    if not current_app.url_map.bind("").test(path, "GET"):
        return None
    query = request.query_string.decode("ascii", "replace")
    return redirect(request.script_root + path + (f"?{query}" if query else ""), 308)  # type: ignore[return-value]


@functools.cache
def static_versions() -> dict[str, str]:
    """Hash all static files once, so that no request opens a file by a client's name to compute its version."""
    files = (file for file in STATIC_FOLDER.rglob("*") if file.is_file())
    return {file.relative_to(STATIC_FOLDER).as_posix(): sha256_of(file)[:VERSION_DIGITS] for file in files}


@bp.app_url_defaults
def add_version(endpoint: str, values: dict[str, Any]) -> None:
    """Add a static file's version to its address, so that the address changes with the content."""
    if endpoint == "static" and "v" not in values:
        values["v"] = static_versions()[values["filename"]]


@bp.get("/favicon.ico")
def favicon() -> ResponseReturnValue:
    """Redirect browsers that request an icon by this fixed name, as for a response without HTML."""
    return redirect(url_for("static", filename="favicon.svg"), 308)


@bp.after_app_request
def cache_static(response: Response) -> Response:
    """Let browsers cache a static file for a year if its address has its version, and revalidate it otherwise."""
    if request.endpoint == "static" and request.method in ("GET", "HEAD") and response.status_code in (200, 304):
        version = static_versions().get((request.view_args or {})["filename"])
        if version is not None and request.args.get("v") == version:
            response.headers["Cache-Control"] = f"public, max-age={ONE_YEAR_S}, immutable"
    return response


def render_markdown(text: str, *, lower_by: int = 1) -> Markup:
    """Render Markdown as HTML in which wide tables can be scrolled by keyboard. HTML in the text is shown as text.

    Args:
        text: The Markdown.
        lower_by: How many levels to lower the headings by.
    """
    tokens = _markdown.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + lower_by)}"
    html = str(_markdown.renderer.render(tokens, _markdown.options, {}))
    return Markup(html.replace("<table>", TABLE).replace("</table>", "</table></div>"))


@bp.app_template_filter("percent")
def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction: 0.992 -> 99.2%. Only 1 becomes 100%, and only 0 becomes 0%."""
    text, step = f"{fraction:.{digits}%}", 10**-digits
    if fraction > 0 and float(text[:-1]) == 0:
        return f"<{step:.{digits}f}%"
    if fraction < 1 and float(text[:-1]) == 100:
        return f">{100 - step:.{digits}f}%"
    return text


@bp.app_template_filter("probability")
def probability(value: float) -> str:
    """Format a model's probability, which is never exactly 0 or 1 although it may be stored so after rounding."""
    return percent(min(max(value, MIN_PROBABILITY), 1 - MIN_PROBABILITY))


@bp.app_template_filter("number")
def number(value: int) -> str:
    """Format a count with grouped digits: 1234 -> 1,234."""
    return f"{value:,}"


@bp.app_template_filter("pluralize")
def pluralize(value: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun: 1 -> "1 photo", 1234 -> "1,234 photos"."""
    return f"{value:,} {noun if value == 1 else plural or f'{noun}s'}"


@bp.app_template_filter("code_spans")
def code_spans(text: str) -> Markup:
    """Show text between backticks as code, and escape everything."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
