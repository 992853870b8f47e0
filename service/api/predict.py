"""Serve predictions and the model's description as JSON: POST /predict and GET /models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, g, jsonify, request

from service.context import services
from service.http import SLOT
from service.http.errors import Problem
from service.http.request_images import Upload, is_client_connected, read_uploads
from service.http.security import require_key
from service.images.render import png_data_url
from service.inference.batcher import InferenceResult
from service.inference.model_manager import LoadedModel
from service.inference.predictor import ranked_probabilities

MAX_TOP_K = 1_000_000

bp = Blueprint("api", __name__)


@dataclass(frozen=True)
class Prediction:
    """The result of one image, or the problem with it."""

    upload: Upload
    result: InferenceResult | None
    problem: Problem | None = None


def classify(uploads: list[Upload], *, all_or_none: bool = False) -> tuple[LoadedModel, list[Prediction]]:
    """Admit, predict and count the images of the current request.

    Args:
        uploads: At least one image.
        all_or_none: Raise the first image's problem; otherwise only that of a single image is raised.

    Returns:
        The model that predicted, and the predictions in the order of ``uploads``.

    Raises:
        Problem: The server is at capacity, not ready or too slow, or an image is invalid.
    """
    app, environ = services(), request.environ
    deadline_ms = app.settings.deadline_ms
    more = len(uploads) - bool(environ.get(SLOT))  # the request itself was admitted as one image
    app.admission.acquire(more)
    completed = 0
    try:
        model, results = app.predictor.predict(
            [upload.data if upload.pixels is None else upload.pixels for upload in uploads if not upload.problem],
            deadline=g.began + deadline_ms / 1e3,
            is_cancelled=lambda: not is_client_connected(environ),
        )
        completed = sum(isinstance(result, InferenceResult) for result in results)
    except TimeoutError:
        raise Problem("deadline_exceeded", f"The request was not completed within {deadline_ms} ms. Retry it later.") from None
    finally:
        app.admission.release(more, completed=completed)
    remaining = iter(results)
    predictions = [_to_prediction(upload, upload.problem or next(remaining)) for upload in uploads]
    for number, prediction in enumerate(predictions, 1):
        if (problem := prediction.problem) and len(uploads) == 1:
            raise problem
        if problem and all_or_none:
            raise Problem(problem.code, f"Image {number} of {len(uploads)}: {problem.detail}", headers=problem.headers)
    for prediction in predictions:
        if prediction.problem:
            app.model_manager.metrics.errors.labels(prediction.problem.code).inc()
        elif prediction.result:
            upload = prediction.upload
            app.predictor.record(model, prediction.result, data=upload.data, content_key=upload.content_key)
    return model, predictions


def _to_prediction(upload: Upload, result: InferenceResult | Problem) -> Prediction:
    if isinstance(result, Problem):
        return Prediction(upload, None, result)
    return Prediction(upload, result)


@bp.post("/predict")
def predict() -> Response:
    settings = services().settings
    g.key_name = require_key(request, settings)
    top_k, crop, abstain = _top_k(), _flag("crop", default="0"), _flag("abstain", default="1")
    model, predictions = classify(read_uploads(request, settings).images)
    rows = [_row(model, prediction, top_k=top_k, crop=crop, abstain=abstain) for prediction in predictions]
    result = jsonify(model=model.summary, request_id=g.request_id, predictions=rows)
    result.headers["X-Model-Version"] = model.bundle.version
    result.headers["Server-Timing"] = _server_timing(predictions)
    return result


@bp.get("/models")
def models() -> Response:
    model = services().model_manager.get()
    bundle, manifest = model.bundle, model.bundle.manifest
    return jsonify(
        models=[
            model.summary
            | {
                "merged_from": bundle.merged_from,
                "backbone": bundle.backbone,
                "classes": bundle.classes,
                "preprocessing": manifest["preprocessing"],
                "metrics": manifest["metrics"],
                "bf16": manifest.get("bf16"),
                "int8": manifest.get("int8"),
                "decision": model.rule.as_dict(),
                "ood": manifest.get("ood"),
                "precision_reason": model.precision.reason,
                "tolerance": model.precision.tolerance,
                "golden_difference": model.golden_difference,
                "created": manifest["provenance"]["created"],
                "card": model.card,
            }
        ]
    )


def _row(model: LoadedModel, prediction: Prediction, *, top_k: int | None, crop: bool, abstain: bool) -> dict[str, Any]:
    name = {"file": prediction.upload.name}
    if prediction.problem:
        return name | {"error": prediction.problem.to_dict()}
    assert prediction.result is not None
    result = prediction.result
    decision = model.decide(result, abstain=abstain)
    row = name | {
        "label": decision.label,
        "because": decision.because,
        "because_code": decision.because_code,
        "in_distribution": decision.in_distribution,
        "ood_score": result.ood_score,
        "confidence": float(result.probabilities[result.top_class]),
        "probabilities": ranked_probabilities(model, result, top_k),
        "width": result.image.width_px,
        "height": result.image.height_px,
        "format": result.image.format,
        "notes": result.image.notes,
    }
    if page := gallery_url(model, prediction):
        row["page"] = page
    return row | ({"crop": png_data_url(result.image.pixels)} if crop else {})


def gallery_url(model: LoadedModel, prediction: Prediction) -> str | None:
    """Return the address of an image's page in the gallery, or None if the image is not saved."""
    recorder, data = services().recorder, prediction.upload.data
    return recorder.page_url(model.bundle.version, data) if recorder and data else None


def _top_k() -> int | None:
    text = request.args.get("top_k")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= MAX_TOP_K:
        raise Problem("bad_parameter", f"`top_k` must be a whole number from 1 to {MAX_TOP_K:,} (got {text[:40]!r}).")
    return int(text)


def _flag(name: str, *, default: str) -> bool:
    text = request.args.get(name, default)
    if text not in ("0", "1"):
        raise Problem("bad_parameter", f"`{name}` must be 0 or 1 (got {text[:40]!r}).")
    return text == "1"


def _server_timing(predictions: list[Prediction]) -> str:
    """Return the duration of each stage, for the slowest image, as browsers display it."""
    results = [prediction.result for prediction in predictions if prediction.result]
    if not results:
        return "total;dur=0"
    decode = max(result.decode_ms for result in results)
    batch_queue = max(result.batch_queue_ms for result in results)
    inference = max(result.inference_ms for result in results)
    return f"decode;dur={decode:.1f}, batch_queue;dur={batch_queue:.1f}, inference;dur={inference:.1f}"
