"""What stands before Flask: the request's id, and a refusal that costs next to nothing when the house is full."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from service.admission import Admission
from service.metrics import Metrics
from service.patience import patience
from service.problems import MEDIA_TYPE, Problem
from service.security import HEADERS, cors_headers

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class Gate:
    """A WSGI layer: admit what will be computed as one photo, until its answer is given, or refuse it at once.

    Refused here, a request costs a twentieth of what it costs in Flask, so that an overloaded server goes on answering.
    ``spoken`` are those of ``paths`` that say it in their own words: there the refusal goes on as ``service.refused``.
    """

    def __init__(
        self,
        app: WSGIApplication,
        admission: Admission,
        metrics: Metrics,
        *,
        paths: re.Pattern[str],
        spoken: re.Pattern[str],
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        self._app = app
        self._admission = admission
        self._metrics = metrics
        self._paths, self._spoken = paths, spoken
        self._cors_origins = cors_origins

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if connection := environ.get("gunicorn.socket"):
            patience.end(connection)  # the headers are there
        environ["service.began"] = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = environ["service.request_id"] = given if ID.fullmatch(given) else uuid.uuid4().hex
        if environ["REQUEST_METHOD"] != "POST" or not self._paths.fullmatch(environ["PATH_INFO"]):
            return self._app(environ, start_response)
        try:
            self._admission.enter()
        except Problem as problem:
            if self._spoken.fullmatch(environ["PATH_INFO"]):
                environ["service.refused"] = problem
                return self._app(environ, start_response)
            return self._refuse(problem, request_id, environ, start_response)
        try:
            return self._app(environ, start_response)
        finally:  # the answer is complete here, as no route that computes streams
            self._admission.leave(answered=0)

    def _refuse(self, problem: Problem, request_id: str, environ: WSGIEnvironment, start_response: Any) -> Iterable[bytes]:
        body, route = problem.body(request_id), environ["PATH_INFO"]
        headers = (
            HEADERS
            | cors_headers(environ.get("HTTP_ORIGIN"), self._cors_origins)
            | problem.headers
            | {"Content-Type": MEDIA_TYPE, "X-Request-ID": request_id, "Content-Length": str(len(body))}
        )
        self._metrics.errors.labels(problem.code).inc()
        self._metrics.requests.labels(route, "POST", problem.status).inc()
        start_response(problem.status_line, list(headers.items()))
        return [body]
