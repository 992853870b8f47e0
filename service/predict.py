"""Photos in, predictions out: what /predict and the page both do, whatever form they answer in."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import numpy as np
from flask import Request, current_app, g
from numpy.typing import NDArray

from models.bundle import Bundle
from service.admission import Admission
from service.model import Model, ServedModel
from service.pipeline import Answer, ClosedError, UnwantedError
from service.problems import Problem
from service.settings import Settings
from service.uploads import Upload, client_is_there, read_uploads

OnAnswer = Callable[[Bundle, bytes, NDArray[np.float32]], None]  # told of every photo that was answered


@dataclass(frozen=True)
class Prediction:
    """One photo's outcome: an ``answer``, or the ``problem`` with it."""

    upload: Upload
    answer: Answer | None
    problem: Problem | None = None


class Predictor:
    """Admits, reads, submits and waits. One for the application."""

    def __init__(
        self, settings: Settings, model: ServedModel, admission: Admission, *, on_answer: OnAnswer | None = None
    ) -> None:
        self._settings = settings
        self._on_answer = on_answer
        self._served = model
        self._admission = admission

    def predict(self, request: Request) -> tuple[Model, list[Prediction]]:
        """The predictions for a request's photos, in their order. Raises Problem where there is nothing to answer.

        A single photo's problem is raised; of several photos each carries its own. The request itself was admitted as one
        photo before it came here (``service.gate``).
        """
        model = self._served.get()
        uploads = read_uploads(request, self._settings)
        more = len(uploads) - 1
        self._admission.enter(more)
        answered = 0
        try:
            predictions = self._wait(request, model, uploads)
            answered = sum(prediction.answer is not None for prediction in predictions)
        finally:
            self._admission.leave(more, answered=answered)
        if len(predictions) == 1 and predictions[0].problem:
            raise predictions[0].problem
        for prediction in predictions:
            self._count(model, prediction)
        return model, predictions

    def _wait(self, request: Request, model: Model, uploads: list[Upload]) -> list[Prediction]:
        until: float = g.began + self._settings.deadline_ms / 1e3
        environ = request.environ

        def is_wanted() -> bool:
            return time.perf_counter() < until and client_is_there(environ)

        predictions = []
        try:
            submitted = [None if upload.problem else model.pipeline.submit(upload.data, is_wanted) for upload in uploads]
            for upload, future in zip(uploads, submitted, strict=True):
                if future is None:
                    predictions.append(Prediction(upload, None, upload.problem))
                    continue
                try:
                    answer = future.result(max(0.0, until - time.perf_counter()))
                    predictions.append(Prediction(upload, answer))
                except Problem as problem:
                    predictions.append(Prediction(upload, None, problem.bare()))
        except (FutureTimeout, UnwantedError):
            raise Problem(
                "deadline_exceeded", f"The answer was not there within {self._settings.deadline_ms} ms; send it again later."
            ) from None
        except ClosedError:
            raise Problem(
                "not_ready", "The model was exchanged just now; send it again.", headers={"Retry-After": "1"}
            ) from None
        return predictions

    def _count(self, model: Model, prediction: Prediction) -> None:
        metrics = self._served.metrics
        if prediction.problem:
            metrics.errors.labels(prediction.problem.code).inc()
        elif prediction.answer:
            probabilities = prediction.answer.probabilities
            metrics.predictions.labels(model.bundle.classes[int(probabilities.argmax())]).inc()
            metrics.confidence.observe(float(probabilities.max()))
            if self._on_answer:
                self._on_answer(model.bundle, prediction.upload.data, probabilities)


def predictor() -> Predictor:
    """The application's own."""
    found: Predictor = current_app.extensions["predictor"]
    return found


def ranked(model: Model, answer: Answer, top_k: int | None = None) -> dict[str, float]:
    """Class -> probability: all of them in the bundle's order, or the ``top_k`` highest, highest first."""
    values = answer.probabilities
    order = np.arange(len(values)) if top_k is None else np.argsort(-values, kind="stable")[:top_k]
    return {model.bundle.classes[i]: float(values[i]) for i in order}
