"""Run images through the current model within a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
from numpy.typing import NDArray

from models.artifacts.bundle import Bundle
from models.runtime.openvino_engine import Pixels
from service.http.errors import Problem
from service.inference.batcher import BatcherClosedError, InferenceResult, RequestCancelledError
from service.inference.image_decoder import PreprocessedImage
from service.inference.model_manager import LoadedModel, ModelManager
from service.inference.recent_predictions import RecentPrediction

PredictionCallback = Callable[[Bundle, bytes, NDArray[np.float32], float | None], None]


class Predictor:
    """Submit images to the model that serves, and wait for their results.

    ``on_prediction`` is called with the bundle, the image file, the probabilities and the OOD score of every recorded
    prediction.
    """

    def __init__(self, models: ModelManager, *, on_prediction: PredictionCallback | None = None) -> None:
        self._models = models
        self._on_prediction = on_prediction

    def predict(
        self, images: Sequence[bytes | Pixels], *, deadline: float, is_cancelled: Callable[[], bool]
    ) -> tuple[LoadedModel, list[InferenceResult | Problem]]:
        """Predict images, all with the same model.

        Args:
            images: Image files, or pixels (H, W, C) uint8 as the network takes them.
            deadline: Time of ``time.perf_counter`` by which the results are required.
            is_cancelled: Whether the results are no longer required; called from other threads.

        Returns:
            The model, and in the order of ``images`` each result, or the problem with the image.

        Raises:
            Problem: No model is ready, or pixels have an unexpected shape.
            TimeoutError: The deadline passed, or the request was cancelled.
        """

        def is_expired_or_cancelled() -> bool:
            return time.perf_counter() >= deadline or is_cancelled()

        model = self._models.get()
        while True:
            prepared = [_check_pixels(image, model) for image in images]
            try:
                futures = model.batcher.submit(prepared, is_expired_or_cancelled, deadline=deadline)
                break
            except BatcherClosedError:  # a rollout replaced the model since ``get``
                if (newer := self._models.get()) is model:
                    raise Problem(
                        "not_ready", "The server is shutting down. Retry the request.", headers={"Retry-After": "1"}
                    ) from None
                model = newer
        results: list[InferenceResult | Problem] = []
        try:
            for future in futures:
                try:
                    results.append(future.result(max(0.0, deadline - time.perf_counter())))
                except Problem as problem:
                    results.append(problem.without_traceback())
        except (FutureTimeout, RequestCancelledError):
            raise TimeoutError from None
        return model, results

    def record(self, model: LoadedModel, result: InferenceResult, *, data: bytes, content_key: int) -> None:
        """Count a prediction that is returned to a client, and keep it for the comparison with the next bundle.

        Args:
            model: The model of the result.
            result: The prediction.
            data: The image file, or nothing if the client sent pixels.
            content_key: Equal for requests with the same content.
        """
        metrics, probabilities = self._models.metrics, result.probabilities
        metrics.predictions.labels(model.bundle.classes[result.top_class]).inc()
        metrics.confidence.observe(float(probabilities[result.top_class]))
        decision = model.decide(result)
        if decision.because_code:
            metrics.abstentions.labels(decision.because_code).inc()
        if self._on_prediction and data:
            self._on_prediction(model.bundle, data, probabilities, result.ood_score)
        self._models.recent_predictions.add(
            RecentPrediction(model.bundle.version, result.image.pixels, probabilities, content_key, decision.in_distribution)
        )


def ranked_probabilities(model: LoadedModel, result: InferenceResult, top_k: int | None = None) -> dict[str, float]:
    """Map classes to probabilities: all in the bundle's order, or the ``top_k`` highest in descending order."""
    values = result.probabilities
    order = np.arange(len(values)) if top_k is None else np.argsort(-values, kind="stable")[:top_k]
    return {model.bundle.classes[i]: float(values[i]) for i in order}


def _check_pixels(image: bytes | Pixels, model: LoadedModel) -> bytes | PreprocessedImage:
    """Wrap pixels as a preprocessed image. Raises Problem if the network takes another shape."""
    if isinstance(image, bytes):
        return image
    preprocessing = model.bundle.preprocessing
    expected = (preprocessing.input_px, preprocessing.input_px, preprocessing.channels)
    if image.shape != expected:
        raise Problem("bad_tensor", f"Expected pixels of shape {list(expected)} per image, got {list(image.shape)}.")
    return PreprocessedImage(image, width_px=preprocessing.input_px, height_px=preprocessing.input_px, format="pixels")
