"""The Flask application: blueprints, the hooks around every request, and errors in one form."""

from __future__ import annotations

import logging
import queue
import re
import threading
import time

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from service import admin, api, docs, health, oip, page, site
from service.admission import Admission
from service.gallery import compare, exports, pages, photo_page, pictures, review
from service.gallery.album import Album
from service.gallery.core import Gallery
from service.gallery.live import Keeper
from service.gate import Gate
from service.model import Model, ServedModel
from service.predict import Predictor
from service.problems import Problem, code_of_status
from service.settings import Settings
from service.swap import Swapper

log = logging.getLogger("service.request")
COMPUTING = re.compile(rf"/|/predict|{oip.INFER.pattern}")
SPOKEN = re.compile(rf"/|{oip.INFER.pattern}")
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})


def build_app(settings: Settings, model: ServedModel) -> Flask:
    """Wire the rooms together."""
    app = Flask("service")
    admission = Admission(settings.queue, gauge=model.metrics.inside)
    gallery = Gallery(settings)
    keeper = Keeper(gallery, settings, model.metrics) if settings.keep_predictions else None
    predictor = Predictor(settings, model, admission, on_answer=keeper.offer if keeper else None)
    app.extensions.update(settings=settings, model=model, admission=admission, predictor=predictor)
    app.extensions.update(gallery=gallery, album=Album(settings, gallery), keeper=keeper)
    app.extensions["swapper"] = Swapper(settings, model)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.register_blueprint(api.bp)
    app.register_blueprint(health.bp)
    app.register_blueprint(oip.bp)
    app.register_blueprint(admin.bp)
    app.register_blueprint(site.bp)
    app.register_blueprint(page.bp)
    app.register_blueprint(docs.bp)
    for part in (pages.bp, photo_page.bp, exports.bp, pictures.bp, review.bp, compare.bp, compare.json_bp):
        app.register_blueprint(part)
    models: queue.SimpleQueue[Model] = queue.SimpleQueue()
    model.when_serving(models.put)
    threading.Thread(target=_show_gallery, args=(gallery, models), name="gallery", daemon=True).start()
    _add_hooks(app, model)
    _add_error_handlers(app, model)
    wsgi = Gate(app.wsgi_app, admission, model.metrics, paths=COMPUTING, spoken=SPOKEN, cors_origins=settings.cors_origins)
    app.wsgi_app = wsgi  # type: ignore[method-assign]
    if settings.proxies:
        hops = settings.proxies
        app.wsgi_app = ProxyFix(wsgi, x_for=hops, x_proto=hops, x_host=hops, x_prefix=hops)  # type: ignore[method-assign]
    return app


def _show_gallery(gallery: Gallery, models: queue.SimpleQueue[Model]) -> None:
    """The gallery comes after the model: who asks for a prediction does not wait for it, and neither does the next bundle."""
    while True:
        gallery.show(models.get())


def _add_hooks(app: Flask, model: ServedModel) -> None:
    @app.before_request
    def begin() -> None:
        g.began = request.environ["service.began"]
        g.request_id = request.environ["service.request_id"]

    @app.after_request
    def finish(answer: Response) -> Response:
        seconds = time.perf_counter() - g.began
        route = request.url_rule.rule if request.url_rule else "none"
        method = request.method if request.method in METHODS else "other"  # a label's every value is kept for ever
        model.metrics.requests.labels(route, method, answer.status_code).inc()
        model.metrics.request_s.labels(route).observe(seconds)
        level = logging.DEBUG if route.startswith("/health") or route == "/metrics" else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level,
                "request",
                extra={
                    "request_id": g.request_id,
                    "method": request.method,
                    "path": request.path,
                    "status": answer.status_code,
                    "code": g.get("code"),
                    "ms": round(seconds * 1e3, 1),
                    "client": request.remote_addr,
                    "key": g.get("key_name"),
                },
            )
        return answer


def _add_error_handlers(app: Flask, model: ServedModel) -> None:
    @app.errorhandler(Problem)
    def problem(error: Problem) -> Response:
        if oip.speaks(request.path):
            site.note_problem(error)
            return oip.error_answer(error)
        return site.problem_json(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status < 400:  # a redirection
            return error.get_response(request.environ)  # type: ignore[return-value]
        code = code_of_status(status)
        wanted = Problem(code, _sentence(code, error))
        if allowed := error.get_response(request.environ).headers.get("Allow"):
            wanted.headers["Allow"] = allowed
        return problem(wanted)

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> Response:
        log.exception("unforeseen", extra={"request_id": g.request_id})
        return problem(
            Problem("internal_error", "An error of the server's own was logged under the request's id; tell its operator.")
        )


def _sentence(code: str, error: HTTPException) -> str:
    if code == "not_found":
        return f"There is no {request.path} here; GET /docs lists what there is."
    if code == "method_not_allowed":
        return f"{request.method} is not allowed on {request.path}; GET /docs lists what is."
    return f"{error.description}"
