"""Build the Flask application: blueprints, request hooks and error handlers.

Requests of programs and pages of people are two applications. The first needs Flask only and is complete at once. The second
also imports SQLAlchemy, which takes as long as loading a model. ``DeferredApp`` builds it once the model is loaded.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, g, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from service.api import admin, health, inference_protocol, predict
from service.context import EXTENSION, Services, services_of
from service.http.admission import AdmissionController
from service.http.compression import compress
from service.http.errors import Problem, code_for_status, problem_from
from service.http.middleware import KNOWN_METHODS, RequestMiddleware, TrustedProxies, normalize_path
from service.http.security import require_allowed_host
from service.http.text_validation import check_items, check_text
from service.inference.model_manager import RETRY_S, ModelManager
from service.inference.predictor import Predictor
from service.rollout.rollout import RolloutManager
from service.rollout.state import RolloutStore, open_store
from service.settings import Settings
from service.web import layout

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("service")
request_log = logging.getLogger("service.request")
API_PATHS = re.compile(r"/(predict|models|metrics|health/.*|v2|v2/.*|admin/.*)")
CUSTOM_ERROR_PATHS = re.compile(rf"/|{inference_protocol.INFER_PATH.pattern}")
INFERENCE_PATHS = re.compile(rf"/predict|{CUSTOM_ERROR_PATHS.pattern}")
MODEL_WAIT_S = 2.0  # pages do not wait longer for a model: they can say that it is being loaded


def create_services(settings: Settings, models: ModelManager, store: RolloutStore | None = None) -> Services:
    """Create the components that the applications of this process share."""
    admission = AdmissionController(settings.max_in_flight, gauge=models.metrics.in_flight)
    rollout = RolloutManager(settings, models, store or open_store(settings))
    return Services(settings, models, admission, rollout, Predictor(models))


class _App(Flask):
    """A Flask application that converts exceptions of the domain to problems before it looks for an error handler."""

    def handle_user_exception(self, e: Exception) -> HTTPException | ResponseReturnValue:
        return super().handle_user_exception(problem_from(e) or e)


def create_api_app(services: Services) -> Flask:
    """Create the application for programs: predictions, health, metrics and administration."""
    settings, models = services.settings, services.model_manager
    app = _App("service")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    for module in (predict, health, inference_protocol, admin):
        app.register_blueprint(module.bp)
    _add_hooks(app, settings, models)
    _add_error_handlers(app)
    middleware = RequestMiddleware(
        app.wsgi_app,
        services.admission,
        models.metrics,
        inference_paths=INFERENCE_PATHS,
        custom_error_paths=CUSTOM_ERROR_PATHS,
        cors_origins=settings.cors_origins,
    )
    app.extensions[EXTENSION] = replace(services, middleware=middleware)
    app.wsgi_app = middleware  # type: ignore[method-assign]
    if settings.trusted_proxies:
        app.wsgi_app = TrustedProxies(middleware, settings.trusted_proxies)  # type: ignore[method-assign]
    return app


def create_full_app(services: Services) -> Flask:
    """Create the application with all pages: the upload page, the gallery and the documentation."""
    from service.gallery import batch_review, compare, embedding_map, export, grid, image_routes, photo, review, threshold
    from service.gallery.index import GalleryIndex
    from service.gallery.recorder import PredictionRecorder
    from service.web import api_docs, upload_page

    settings, models = services.settings, services.model_manager
    gallery = GalleryIndex(settings)
    services = replace(services, gallery=gallery, image_access=image_routes.ImageAccess(settings, gallery, models.decoder))
    if settings.save_predictions:
        services.recorder = PredictionRecorder(gallery, settings, models.metrics)
        services.predictor = Predictor(models, on_prediction=services.recorder.record)
    if settings.studio:
        from service.studio.workspace import Workspace

        services.workspace = Workspace.of(settings)
    app = create_api_app(services)
    pages = (
        layout,
        upload_page,
        api_docs,
        grid,
        photo,
        export,
        image_routes,
        review,
        batch_review,
        compare,
        embedding_map,
        threshold,
    )
    for blueprint in (*(module.bp for module in pages), compare.json_bp, embedding_map.json_bp):
        app.register_blueprint(blueprint)

    if settings.studio:
        _add_studio(app)
    gallery.follow(models)
    return app


def _add_studio(app: Flask) -> None:
    """Register the pages of the studio. Without the studio their addresses do not exist."""
    from service.studio import audit_page, data_pages, job_pages, run_pages, start_page, train_page
    from service.studio.finetune_process import is_installed
    from service.studio.runner_supervisor import supervise

    for module in (start_page, data_pages, audit_page, train_page, job_pages, run_pages):
        app.register_blueprint(module.bp)
    if is_installed():
        services = services_of(app)
        supervise(services.settings, services.model_manager.closed)


class DeferredApp:
    """A WSGI application that serves programs at once and builds the pages once the model is loaded.

    Both would compete for the interpreter's lock. Requests for pages wait until the full application is built, which
    from then on handles all requests.
    """

    def __init__(self, services: Services) -> None:
        self._api_app = create_api_app(services)
        self._full_app: Future[Flask] = Future()
        threading.Thread(target=self._build, args=(services,), name="build-pages", daemon=True).start()

    @property
    def extensions(self) -> dict[str, Any]:
        """The extensions of the application that currently handles requests of programs."""
        return (self._full_app.result() if self._full_app.done() else self._api_app).extensions

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        normalize_path(environ)
        if not self._full_app.done() and API_PATHS.fullmatch(environ["PATH_INFO"]):
            return self._api_app(environ, start_response)
        return self._full_app.result()(environ, start_response)

    def _build(self, services: Services) -> None:
        services.model_manager.loaded.wait(MODEL_WAIT_S)
        try:
            self._full_app.set_result(create_full_app(services))
            gc.freeze()
        except BaseException:  # without its pages the server is broken
            log.exception("the pages could not be built")
            from gunicorn.arbiter import Arbiter

            if services.rollout.is_replacement:  # gunicorn replaces the worker again
                services.model_manager.closed.wait(RETRY_S)
                os._exit(1)
            os._exit(Arbiter.WORKER_BOOT_ERROR)


def _add_hooks(app: Flask, settings: Settings, models: ModelManager) -> None:
    @app.before_request
    def check_request() -> None:
        g.began = request.environ["service.began"]
        g.request_id = request.environ["service.request_id"]
        require_allowed_host(request, settings)
        check_text("The path", request.path)
        if request.query_string:
            check_items("parameter", request.args.items(multi=True))

    @app.after_request
    def finish_response(response: Response) -> Response:
        # Flask's proxies look up the thread's request at every use.
        current, context = request._get_current_object(), g._get_current_object()  # type: ignore[attr-defined]
        compress(current, response)
        duration_s = time.perf_counter() - context.began
        route = current.url_rule.rule if current.url_rule else "none"
        method = current.method if current.method in KNOWN_METHODS else "other"  # Prometheus keeps every label value
        models.metrics.requests.labels(route, method, response.status_code).inc()
        models.metrics.request_duration.labels(route).observe(duration_s)
        level = logging.DEBUG if route.startswith("/health") or route == "/metrics" else logging.INFO
        if request_log.isEnabledFor(level):
            request_log.log(
                level,
                "request",
                extra={
                    "request_id": context.request_id,
                    "method": current.method,
                    "path": current.path,
                    "status": response.status_code,
                    "code": context.get("code"),
                    "duration_ms": round(duration_s * 1e3, 1),
                    "client": current.remote_addr,
                    "key_name": context.get("key_name"),
                },
            )
        return response


def _add_error_handlers(app: Flask) -> None:
    @app.errorhandler(Problem)
    def handle_problem(problem: Problem) -> Response:
        if inference_protocol.is_protocol_path(request.path):
            layout.record_problem(problem)
            return inference_protocol.error_response(problem)
        response = layout.problem_response(problem)
        response.vary.add("Accept")
        return response

    @app.errorhandler(HTTPException)
    def handle_http_exception(error: HTTPException) -> Response:
        status = error.code or 500
        response = error.get_response(request.environ)
        if status < 400:  # a redirect
            return response  # type: ignore[return-value]
        code = code_for_status(status)
        detail = f"{error.description}"
        if code == "not_found":
            detail = f"{request.path} does not exist. GET /docs lists all routes."
        elif code == "method_not_allowed":
            detail = f"{request.method} is not allowed on {request.path}. GET /docs lists the allowed methods."
        problem = Problem(code, detail)
        if allowed := response.headers.get("Allow"):
            problem.headers["Allow"] = allowed
        return handle_problem(problem)

    @app.errorhandler(Exception)
    def handle_unexpected(error: Exception) -> Response:
        request_log.exception("unhandled exception", extra={"request_id": g.request_id})
        return handle_problem(
            Problem("internal_error", "An unexpected error was logged with the request id. Report it to the server's operator.")
        )
