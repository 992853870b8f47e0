"""The Flask application that programs ask: blueprints, the hooks around every request, and errors in one form."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from service.api import admin, health, inference_protocol, predict
from service.context import EXTENSION, Services
from service.http.admission import AdmissionController
from service.http.errors import Problem, code_for_status
from service.http.middleware import KNOWN_METHODS, RequestMiddleware
from service.http.text_validation import check_items, check_text
from service.inference.model_manager import ModelManager
from service.inference.predictor import Predictor
from service.rollout.rollout import RolloutManager
from service.settings import Settings
from service.web import layout

log = logging.getLogger("service.request")
INFERENCE_PATHS = re.compile(rf"/|/predict|{inference_protocol.INFER_PATH.pattern}")
CUSTOM_ERROR_PATHS = re.compile(rf"/|{inference_protocol.INFER_PATH.pattern}")


def create_services(settings: Settings, models: ModelManager) -> Services:
    """Create the components that all applications of this process share."""
    admission = AdmissionController(settings.max_in_flight, gauge=models.metrics.in_flight)
    predictor = Predictor(settings, models, admission)
    return Services(settings, models, admission, RolloutManager(settings, models), predictor)


def create_api_app(services: Services) -> Flask:
    """Create the application without its pages."""
    settings, model = services.settings, services.model_manager
    app = Flask("service")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    for part in (predict, health, inference_protocol, admin):
        app.register_blueprint(part.bp)
    _add_hooks(app, model)
    _add_error_handlers(app, model)
    wsgi = RequestMiddleware(
        app.wsgi_app,
        services.admission,
        model.metrics,
        inference_paths=INFERENCE_PATHS,
        custom_error_paths=CUSTOM_ERROR_PATHS,
        cors_origins=settings.cors_origins,
    )
    app.wsgi_app = wsgi  # type: ignore[method-assign]
    app.extensions[EXTENSION] = replace(services, middleware=wsgi)
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(wsgi, x_for=hops, x_proto=hops, x_host=hops, x_prefix=hops)  # type: ignore[method-assign]
    return app


def _add_hooks(app: Flask, model: ModelManager) -> None:
    @app.before_request
    def begin() -> None:
        g.began = request.environ["service.began"]
        g.request_id = request.environ["service.request_id"]
        check_text("The path", request.path)
        if request.query_string:
            check_items("parameter", request.args.items(multi=True))

    @app.after_request
    def finish(answer: Response) -> Response:
        # Flask's proxies look up the thread's request at every use.
        asked, noted = request._get_current_object(), g._get_current_object()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - noted.began
        route = asked.url_rule.rule if asked.url_rule else "none"
        method = asked.method if asked.method in KNOWN_METHODS else "other"  # a label's every value is kept for ever
        model.metrics.requests.labels(route, method, answer.status_code).inc()
        model.metrics.request_duration.labels(route).observe(seconds)
        level = logging.DEBUG if route.startswith("/health") or route == "/metrics" else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level,
                "request",
                extra={
                    "request_id": noted.request_id,
                    "method": asked.method,
                    "path": asked.path,
                    "status": answer.status_code,
                    "code": noted.get("code"),
                    "duration_ms": round(seconds * 1e3, 1),
                    "client": asked.remote_addr,
                    "key_name": noted.get("key_name"),
                },
            )
        return answer


def _add_error_handlers(app: Flask, model: ModelManager) -> None:
    @app.errorhandler(Problem)
    def problem(error: Problem) -> Response:
        if inference_protocol.is_protocol_path(request.path):
            layout.record_problem(error)
            return inference_protocol.error_response(error)
        return layout.problem_response(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status < 400:  # a redirection
            return error.get_response(request.environ)  # type: ignore[return-value]
        code = code_for_status(status)
        wanted = Problem(code, _sentence(code, error))
        if allowed := error.get_response(request.environ).headers.get("Allow"):
            wanted.headers["Allow"] = allowed
        return problem(wanted)

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> Response:
        log.exception("unhandled exception", extra={"request_id": g.request_id})
        return problem(
            Problem("internal_error", "An error of the server's own was logged under the request's id; tell its operator.")
        )


def _sentence(code: str, error: HTTPException) -> str:
    if code == "not_found":
        return f"There is no {request.path} here; GET /docs lists what there is."
    if code == "method_not_allowed":
        return f"{request.method} is not allowed on {request.path}; GET /docs lists what is."
    return f"{error.description}"
