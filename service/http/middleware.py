"""The WSGI middleware in front of Flask: request ids, the headers of every response, and the admission of predictions."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from service.http import REJECTION, SLOT
from service.http.admission import AdmissionController, Slot
from service.http.errors import PROBLEM_MEDIA_TYPE, Problem
from service.http.security import SECURITY_HEADERS, cors_headers
from service.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
PROBLEM_FRESH_S = 0.25
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})  # a label's every value is kept


def normalize_path(environ: WSGIEnvironment) -> None:
    """Drop repeated slashes at a path's beginning, as Werkzeug's router does: else what compares paths is walked around."""
    path = environ["PATH_INFO"]
    if path[:1] != "/" or path[1:2] == "/":
        environ["PATH_INFO"] = "/" + path.lstrip("/")


class RequestMiddleware:
    """Admit predictions up to the server's capacity, and reject the rest with 503.

    A server that admits or rejects requests itself, before their bodies (``service.http.gunicorn_worker``), says so in the
    environment with SLOT and REJECTION; under any other it is done here. ``inference_paths`` are those of predictions;
    where a path is in ``custom_error_paths``, the application itself words the rejection.
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
        self._paths, self._spoken = inference_paths, custom_error_paths
        self._cors_origins = cors_origins
        self._overloaded: tuple[float, Problem] | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.begin(environ)
        if self.is_prediction(environ) and REJECTION not in environ and SLOT not in environ:
            environ[SLOT] = slot = self.admission.try_acquire_slot()
            if slot is None:
                environ[REJECTION] = self.overloaded()
        if REJECTION in environ and not self.has_own_rejections(environ):
            return self.respond(environ, start_response)
        try:
            return self._app(environ, self._start(environ, start_response))
        finally:  # the response is complete here, as no route that computes streams
            given: Slot | None = environ.get(SLOT)
            if given:
                given.release()

    def begin(self, environ: WSGIEnvironment) -> None:
        """Note a request's path and the time of its arrival; a second time changes nothing."""
        normalize_path(environ)
        environ.setdefault("service.began", time.perf_counter())

    def is_prediction(self, environ: WSGIEnvironment) -> bool:
        """Return whether the request counts among those in flight."""
        return environ["REQUEST_METHOD"] == "POST" and bool(self._paths.fullmatch(environ["PATH_INFO"]))

    def has_own_rejections(self, environ: WSGIEnvironment) -> bool:
        """Return whether the application words a rejection of this request: a page, or another protocol."""
        return self.is_prediction(environ) and bool(self._spoken.fullmatch(environ["PATH_INFO"]))

    def respond(self, environ: WSGIEnvironment, start_response: StartResponse, *, counts: bool = True) -> Iterable[bytes]:
        """Answer with the problem in REJECTION, and count it."""
        problem: Problem = environ[REJECTION]
        start = self._start(environ, start_response)
        route = "/predict" if environ["PATH_INFO"] == "/predict" else "none"
        method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in KNOWN_METHODS else "other"
        if counts:
            self.metrics.errors.labels(problem.code).inc()
            self.metrics.requests.labels(route, method, problem.status).inc()
        to_json = problem.to_json(environ["service.request_id"])
        start(
            problem.status_line,
            [("Content-Type", PROBLEM_MEDIA_TYPE), ("Content-Length", str(len(to_json))), *problem.headers.items()],
        )
        return [] if method == "HEAD" else [to_json]

    def count_overloaded(self) -> None:
        """Count one POST /predict that was rejected for want of capacity."""
        self.metrics.errors.labels("overloaded").inc()
        self.metrics.requests.labels("/predict", "POST", 503).inc()
        self.metrics.requests_rejected.labels("at_capacity").inc()

    def overloaded(self) -> Problem:
        """Return the problem of a request that exceeds the capacity; made anew when it is PROBLEM_FRESH_S old."""
        now = time.monotonic()
        if self._overloaded is None or now > self._overloaded[0]:
            self._overloaded = now + PROBLEM_FRESH_S, self.admission.overload_problem()
        return self._overloaded[1]

    def _start(self, environ: WSGIEnvironment, start_response: StartResponse) -> StartResponse:
        """Return a ``start_response`` that adds the headers of every response."""
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = environ["service.request_id"] = given if ID.fullmatch(given) else uuid.uuid4().hex
        origin = environ.get("HTTP_ORIGIN") if environ["PATH_INFO"] == "/predict" else None
        headers = [*(SECURITY_HEADERS | cors_headers(origin, self._cors_origins)).items(), ("X-Request-ID", request_id)]

        def start(status: str, own: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, own + headers, *error)

        return start
