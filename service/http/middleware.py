"""What stands before Flask: the request's id, the headers of every answer, and a refusal that costs next to nothing."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from service.http.admission import AdmissionController
from service.http.errors import PROBLEM_MEDIA_TYPE, Problem
from service.http.read_deadline import read_deadlines
from service.http.request_body import has_unread_body
from service.http.security import SECURITY_HEADERS, cors_headers
from service.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class RequestMiddleware:
    """A WSGI layer: admit what will be computed as one photo, until its answer is given, or refuse it at once.

    Refused here, a request costs a tenth of an answer; of a flood most are refused before it, in its words (service.http.early_rejection).
    ``custom_error_paths`` are those of ``inference_paths`` that say it in their own words: there the refusal goes on as ``service.refused``.
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
        self._metrics = metrics
        self._paths, self._spoken = inference_paths, custom_error_paths
        self._cors_origins = cors_origins

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if connection := environ.get("gunicorn.socket"):
            read_deadlines.end(connection)  # the headers are there
        environ["service.began"] = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = environ["service.request_id"] = given if ID.fullmatch(given) else uuid.uuid4().hex
        headers = self._headers(environ, request_id)

        end_connection = getattr(environ["wsgi.input"], "end_connection", None)  # service.http.early_rejection's

        def start(status: str, own: list[tuple[str, str]], *error: Any) -> Any:
            if end_connection and has_unread_body(environ):
                end_connection()
            return start_response(status, own + headers, *error)

        if environ["REQUEST_METHOD"] != "POST" or not self._paths.fullmatch(environ["PATH_INFO"]):
            return self._app(environ, start)
        place = getattr(
            environ["wsgi.input"], "place", None
        )  # service.http.early_rejection's; False where it knows that there is none
        if place is None and not (place := self.admission.try_acquire_slot()):
            if self._spoken.fullmatch(environ["PATH_INFO"]):
                environ["service.rejected"] = self.admission.overload_problem()
                return self._app(environ, start)
            self.count_rejection()
        if not place:
            return _refuse(self.admission.overload_problem(), request_id, start)
        try:
            return self._app(environ, start)
        finally:  # the answer is complete here, as no route that computes streams
            place.release()

    def _headers(self, environ: WSGIEnvironment, request_id: str) -> list[tuple[str, str]]:
        origin = environ.get("HTTP_ORIGIN") if environ["PATH_INFO"] == "/predict" else None
        return [*(SECURITY_HEADERS | cors_headers(origin, self._cors_origins)).items(), ("X-Request-ID", request_id)]

    def count_rejection(self) -> None:
        self._metrics.errors.labels("overloaded").inc()
        self._metrics.requests.labels("/predict", "POST", 503).inc()


def _refuse(problem: Problem, request_id: str, start: Any) -> Iterable[bytes]:
    to_json = problem.to_json(request_id)
    start(
        problem.status_line,
        [("Content-Type", PROBLEM_MEDIA_TYPE), ("Content-Length", str(len(to_json))), *problem.headers.items()],
    )
    return [to_json]
