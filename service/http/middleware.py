"""WSGI middleware in front of Flask: request IDs, the headers of every response, and the admission of predictions."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from werkzeug.middleware.proxy_fix import ProxyFix

from service.http import REJECTION, SLOT
from service.http.admission import AdmissionController, Slot
from service.http.errors import PROBLEM_MEDIA_TYPE, Problem
from service.http.security import SECURITY_HEADERS, cors_headers
from service.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
PATH_PREFIX = re.compile(r"(/[\w.~-]+)*/?", re.ASCII)
OVERLOAD_PROBLEM_S = 0.25  # how long a computed problem is reused
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})  # a metric keeps every label value


def normalize_path(environ: WSGIEnvironment) -> None:
    """Drop repeated leading slashes, as Werkzeug's router does, so that comparing paths cannot be bypassed."""
    path = environ["PATH_INFO"]
    if path[:1] != "/" or path[1:2] == "/":
        environ["PATH_INFO"] = "/" + path.lstrip("/")


class RequestMiddleware:
    """Admit predictions up to the server's capacity and reject the others with 503.

    A server that decides this itself, before the body arrives (``service.http.gunicorn_worker``), reports its decision in
    the environment as SLOT or REJECTION. Under any other server it is decided here.

    Args:
        app: The application.
        admission: Counts the images in flight.
        metrics: Count requests and rejections.
        inference_paths: The paths of predictions.
        custom_error_paths: Those of them whose rejections the application words itself.
        cors_origins: Origins whose pages may call /predict.
    """

    def __init__(
        self,
        app: WSGIApplication,
        admission: AdmissionController,
        metrics: Metrics,
        *,
        inference_paths: re.Pattern[str],
        custom_error_paths: re.Pattern[str],
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        self._app = app
        self.admission = admission
        self.metrics = metrics
        self._inference_paths, self._custom_error_paths = inference_paths, custom_error_paths
        self._cors_origins = cors_origins
        self._overloaded: tuple[float, Problem] | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.begin(environ)
        if self.is_prediction(environ) and REJECTION not in environ and SLOT not in environ:
            environ[SLOT] = self.admission.try_acquire_slot()
            if environ[SLOT] is None:
                self.metrics.requests_rejected.labels("at_capacity").inc()
                environ[REJECTION] = self.overloaded()
        if REJECTION in environ and not self.has_own_rejections(environ):
            return self.respond(environ, start_response)
        try:
            return self._app(environ, self._with_headers(environ, start_response))
        finally:  # the response is complete here, as no route that predicts streams
            slot: Slot | None = environ.get(SLOT)
            if slot:
                slot.release()

    def begin(self, environ: WSGIEnvironment) -> None:
        """Normalize the path and record the time of arrival. A second call changes nothing."""
        normalize_path(environ)
        environ.pop("HTTP_UPGRADE", None)  # a server may ignore it, and Werkzeug rejects one to a WebSocket
        environ.setdefault("service.began", time.perf_counter())

    def is_prediction(self, environ: WSGIEnvironment) -> bool:
        """Return whether the request counts as in flight."""
        return environ["REQUEST_METHOD"] == "POST" and bool(self._inference_paths.fullmatch(environ["PATH_INFO"]))

    def has_own_rejections(self, environ: WSGIEnvironment) -> bool:
        """Return whether the application words a rejection of this request, as for a page or another protocol."""
        return self.is_prediction(environ) and bool(self._custom_error_paths.fullmatch(environ["PATH_INFO"]))

    def respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Respond with the problem in REJECTION, and count it."""
        problem: Problem = environ[REJECTION]
        start = self._with_headers(environ, start_response)
        route = "/predict" if environ["PATH_INFO"] == "/predict" else "none"
        method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in KNOWN_METHODS else "other"
        self.metrics.errors.labels(problem.code).inc()
        self.metrics.requests.labels(route, method, problem.status).inc()
        body = problem.to_json(environ["service.request_id"])
        start(
            problem.status_line,
            [("Content-Type", PROBLEM_MEDIA_TYPE), ("Content-Length", str(len(body))), *problem.headers.items()],
        )
        return [] if method == "HEAD" else [body]

    def overloaded(self) -> Problem:
        """Return the problem of a request above the capacity, recomputed every OVERLOAD_PROBLEM_S."""
        now = time.monotonic()
        if self._overloaded is None or now > self._overloaded[0]:
            self._overloaded = now + OVERLOAD_PROBLEM_S, self.admission.overload_problem()
        return self._overloaded[1]

    def _with_headers(self, environ: WSGIEnvironment, start_response: StartResponse) -> StartResponse:
        """Return a ``start_response`` that adds the headers of every response."""
        client_id = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = environ["service.request_id"] = client_id if REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        origin = environ.get("HTTP_ORIGIN") if environ["PATH_INFO"] == "/predict" else None
        added = [*(SECURITY_HEADERS | cors_headers(origin, self._cors_origins)).items(), ("X-Request-ID", request_id)]

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            return start_response(status, headers + added, *exc_info)

        return start


class TrustedProxies(ProxyFix):
    """Take scheme, host, client address and path prefix from the headers of the proxies in front.

    A prefix that is not a plain path is ignored: ``//example.com`` would turn every link of a page into one to another site.
    """

    def __init__(self, app: WSGIApplication, count: int) -> None:
        super().__init__(app, x_for=count, x_proto=count, x_host=count, x_prefix=count)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        prefixes = environ.get("HTTP_X_FORWARDED_PREFIX", "")
        if not all(PATH_PREFIX.fullmatch(prefix.strip()) for prefix in prefixes.split(",")):
            del environ["HTTP_X_FORWARDED_PREFIX"]
        return super().__call__(environ, start_response)
