"""Photos in, predictions out: what /predict and the page both do, whatever form they answer in."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import numpy as np
from flask import Request, g
from numpy.typing import NDArray

from models.artifacts.bundle import Bundle
from service.http import SLOT
from service.http.admission import AdmissionController
from service.http.errors import Problem
from service.http.uploads import Upload, is_client_connected
from service.inference.batcher import BatcherClosedError, InferenceResult, RequestCancelledError
from service.inference.image_decoder import PreprocessedImage
from service.inference.model_manager import LoadedModel, ModelManager
from service.inference.recent_predictions import RecentPrediction
from service.settings import Settings

PredictionCallback = Callable[[Bundle, bytes, NDArray[np.float32]], None]  # told of every photo that was answered


@dataclass(frozen=True)
class Prediction:
    """One photo's outcome: an ``answer``, or the ``problem`` with it."""

    upload: Upload
    result: InferenceResult | None
    problem: Problem | None = None


class Predictor:
    """Admits, reads, submits and waits. One for the application."""

    def __init__(
        self,
        settings: Settings,
        model: ModelManager,
        admission: AdmissionController,
        *,
        on_prediction: PredictionCallback | None = None,
    ) -> None:
        self._settings = settings
        self._on_answer = on_prediction
        self._served = model
        self._admission = admission

    def predict(
        self, request: Request, uploads: list[Upload], *, all_or_none: bool = False
    ) -> tuple[LoadedModel, list[Prediction]]:
        """The model that answered, and its predictions for ``uploads`` in their order. Raises Problem where there are none.

        A single photo's problem is raised; of several photos each carries its own, but with ``all_or_none`` the first is
        raised. The request itself was admitted as one photo before it came here (``service.http.middleware``); were there a
        way around that, it would be admitted here.
        """
        more = len(uploads) - bool(request.environ.get(SLOT))
        self._admission.acquire(more)
        completed = 0
        try:
            model, predictions = self._wait(request, uploads)
            completed = sum(prediction.result is not None for prediction in predictions)
        finally:
            self._admission.release(more, completed=completed)
        bad = [number for number, prediction in enumerate(predictions, 1) if prediction.problem]
        if bad and (all_or_none or len(predictions) == 1):
            raise _of_all(predictions, bad[0])
        for prediction in predictions:
            self._count(model, prediction)
        return model, predictions

    def _wait(self, request: Request, uploads: list[Upload]) -> tuple[LoadedModel, list[Prediction]]:
        until: float = g.began + self._settings.deadline_ms / 1e3
        environ = request.environ

        def is_wanted() -> bool:
            return time.perf_counter() < until and is_client_connected(environ)

        model, submitted = self._submit(uploads, is_wanted, until)
        predictions = []
        try:
            for upload, future in zip(uploads, submitted, strict=True):
                if future is None:
                    predictions.append(Prediction(upload, None, upload.problem))
                    continue
                try:
                    answer = future.result(max(0.0, until - time.perf_counter()))
                    predictions.append(Prediction(upload, answer))
                except Problem as problem:
                    predictions.append(Prediction(upload, None, problem.without_traceback()))
        except (FutureTimeout, RequestCancelledError):
            raise Problem(
                "deadline_exceeded", f"The answer was not there within {self._settings.deadline_ms} ms; send it again later."
            ) from None
        return model, predictions

    def _submit(
        self, uploads: list[Upload], is_wanted: Callable[[], bool], until: float
    ) -> tuple[LoadedModel, list[Future[InferenceResult] | None]]:
        """All photos to one model: where it was exchanged between the look and the touch, to the one that came after it."""
        model = self._served.get()
        while True:
            photos = [_as_sent(upload, model) for upload in uploads if not upload.problem]
            try:
                futures = iter(model.batcher.submit_all(photos, is_wanted, until=until))
            except BatcherClosedError:
                if (now := self._served.get()) is model:
                    raise Problem(
                        "not_ready", "The server is being stopped; send it again.", headers={"Retry-After": "1"}
                    ) from None
                model = now
                continue
            return model, [None if upload.problem else next(futures) for upload in uploads]

    def _count(self, model: LoadedModel, prediction: Prediction) -> None:
        metrics = self._served.metrics
        if prediction.problem:
            metrics.errors.labels(prediction.problem.code).inc()
        elif prediction.result:
            probabilities, top_class = prediction.result.probabilities, prediction.result.top_class
            metrics.predictions.labels(model.bundle.classes[top_class]).inc()
            metrics.confidence.observe(float(probabilities[top_class]))
            if self._on_answer and prediction.upload.data:
                self._on_answer(model.bundle, prediction.upload.data, probabilities)
            seen = RecentPrediction(
                model.bundle.version, prediction.result.image.pixels, probabilities, prediction.upload.content_key
            )
            self._served.recent_predictions.add(seen)


def _as_sent(upload: Upload, model: LoadedModel) -> bytes | PreprocessedImage:
    """What the pipeline takes: a photo's bytes, or the pixels that came in their place. Raises Problem for a wrong shape."""
    if upload.pixels is None:
        return upload.data
    seen = model.bundle.preprocessing
    wanted = (seen.input_px, seen.input_px, seen.channels)
    if upload.pixels.shape != wanted:
        raise Problem("bad_tensor", f"The pixels have the shape {list(upload.pixels.shape)} a photo; {list(wanted)} is wanted.")
    return PreprocessedImage(upload.pixels, width_px=seen.input_px, height_px=seen.input_px, format="pixels")


def _of_all(predictions: list[Prediction], number: int) -> Problem:
    """The problem of the photo ``number`` as that of the whole request."""
    problem = predictions[number - 1].problem
    assert problem is not None
    if len(predictions) == 1:
        return problem
    return Problem(problem.code, f"Photo {number} of {len(predictions)}: {problem.detail}", headers=problem.headers)


def ranked_probabilities(model: LoadedModel, answer: InferenceResult, top_k: int | None = None) -> dict[str, float]:
    """Class -> probability: all of them in the bundle's order, or the ``top_k`` highest, highest first."""
    values = answer.probabilities
    order = np.arange(len(values)) if top_k is None else np.argsort(-values, kind="stable")[:top_k]
    return {model.bundle.classes[i]: float(values[i]) for i in order}
