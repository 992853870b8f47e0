"""Serve the Open Inference Protocol (KServe's version 2, over REST), with the predictions of /predict.

https://github.com/kserve/open-inference-protocol, with Triton's extensions ``binary_tensor_data`` and ``classification``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from flask import Blueprint, Response, g, jsonify, request
from numpy.typing import NDArray

from service.api.predict import classify
from service.api.tensor_codec import (
    OOD_OUTPUT,
    OUTPUTS,
    REASON_OUTPUT,
    InputTensor,
    RequestedOutput,
    encode_response,
    parse_request,
    tensor_problem,
)
from service.context import services
from service.http import REJECTION
from service.http.errors import Problem
from service.http.request_body import read_body
from service.http.request_images import Upload, upload_from_base64
from service.http.security import require_key
from service.inference.batcher import InferenceResult
from service.inference.model_manager import LoadedModel

INFER_PATH = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
SERVER_NAME = "dogs-vs-cats"

bp = Blueprint("oip", __name__, url_prefix="/v2")


@bp.get("")
def server() -> Response:
    return jsonify(name=SERVER_NAME, version=_own_version(), extensions=["binary_tensor_data", "classification"])


@bp.get("/health/live")
def live() -> Response:
    return jsonify(live=True)


@bp.get("/health/ready")
def ready() -> Response:
    services().model_manager.check_ready()
    return jsonify(ready=True)


@bp.get("/models/<name>", defaults={"version": None})
@bp.get("/models/<name>/versions/<version>")
def metadata(name: str, version: str | None) -> Response:
    model = _find_model(name, version)
    preprocessing, classes = model.bundle.preprocessing, len(model.bundle.classes)
    outputs = [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": REASON_OUTPUT, "datatype": "BYTES", "shape": [-1]},
        {"name": OOD_OUTPUT, "datatype": "FP32", "shape": [-1]},
    ]
    size_px, channels = preprocessing.input_px, preprocessing.channels
    return jsonify(
        name=model.bundle.name,
        versions=[model.bundle.version],
        platform="onnx_onnxv1",
        inputs=[
            {"name": "images", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, size_px, size_px, channels]},
        ],
        outputs=[output for output in outputs if output["name"] in _output_names(model)],
        parameters={"max_ood_score": model.rule.max_ood_score},
    )


@bp.get("/models/<name>/ready", defaults={"version": None})
@bp.get("/models/<name>/versions/<version>/ready")
def model_ready(name: str, version: str | None) -> Response:
    model = services().model_manager.check_ready()
    _check_name(model, name, version)
    return jsonify(name=model.bundle.name, ready=True)


@bp.post("/models/<name>/infer", defaults={"version": None})
@bp.post("/models/<name>/versions/<version>/infer")
def infer(name: str, version: str | None) -> Response:
    if rejection := request.environ.get(REJECTION):
        raise rejection
    settings = services().settings
    g.key_name = require_key(request, settings)
    expected = _find_model(name, version)
    parsed = parse_request(
        read_body(request, settings),
        _json_bytes(),
        settings,
        expected.bundle.preprocessing,
        output_names=_output_names(expected),
    )
    model, predictions = classify(_uploads(parsed.input), all_or_none=True)
    _check_name(model, name, version)  # a rollout may have replaced the model meanwhile
    members = {"model_name": model.bundle.name, "model_version": model.bundle.version}
    if parsed.id is not None:
        members["id"] = parsed.id
    results = [prediction.result for prediction in predictions if prediction.result]
    available = _output_names(model)  # fewer if a rollout has put a model without an OOD score live meanwhile
    outputs = [(output, _output_values(output, results, model)) for output in parsed.outputs if output.name in available]
    body, json_bytes = encode_response(members, outputs)
    response = Response(body, mimetype="application/json" if json_bytes is None else "application/octet-stream")
    response.headers["X-Model-Version"] = model.bundle.version
    if json_bytes is not None:
        response.headers[JSON_LENGTH_HEADER] = str(json_bytes)
    return response


def is_protocol_path(path: str) -> bool:
    """Return whether errors on this path have the protocol's format."""
    return path == "/v2" or path.startswith("/v2/")


def error_response(problem: Problem) -> Response:
    """Return a problem in the protocol's format."""
    response = jsonify(error=problem.detail)
    response.status_code = problem.status
    response.headers.update(problem.headers)
    return response


def _find_model(name: str, version: str | None) -> LoadedModel:
    model = services().model_manager.get()
    _check_name(model, name, version)
    return model


def _check_name(model: LoadedModel, name: str, version: str | None) -> None:
    """Raise Problem if this is not the active model."""
    if name != model.bundle.name or version not in (None, model.bundle.version):
        requested = name if version is None else f"{name}, version {version}"
        active = f"{model.bundle.name}, version {model.bundle.version}"
        raise Problem("not_found", f"Model not found: {requested[:200]}. The active model is {active}.")


def _json_bytes() -> int | None:
    text = request.headers.get(JSON_LENGTH_HEADER)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise tensor_problem(f"{JSON_LENGTH_HEADER} must be a whole number (got {text[:40]!r}).")
    return int(text)


def _uploads(tensor: InputTensor) -> list[Upload]:
    rows: list[Any] = list(tensor.pixels if tensor.pixels is not None else tensor.elements or [])
    if not rows:
        raise Problem("no_image", f"The tensor {tensor.name} is empty. Send at least one image.")
    return [_upload(row) for row in rows]


def _upload(row: Any) -> Upload:
    if isinstance(row, bytes):
        return Upload(None, row)
    return upload_from_base64(row) if isinstance(row, str) else Upload(None, b"", pixels=row)


def _output_names(model: LoadedModel) -> tuple[str, ...]:
    return (*OUTPUTS, OOD_OUTPUT) if model.bundle.has_ood_score else OUTPUTS


def _output_values(output: RequestedOutput, results: Sequence[InferenceResult], model: LoadedModel) -> NDArray[Any]:
    """Compute an output (N, ...) from the results."""
    if output.name == OOD_OUTPUT:
        return np.array([result.ood_score for result in results], np.float32)
    if output.name == REASON_OUTPUT:
        return np.array([model.decide(result).because_code or "" for result in results], dtype=object)
    probabilities = np.stack([result.probabilities for result in results])
    names = np.array(model.bundle.classes, dtype=object)
    if output.name == "label":
        return names[probabilities.argmax(axis=1)]
    if not output.classes:
        return probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : output.classes]
    texts = [[f"{row[i]:f}:{i}:{names[i]}" for i in top] for row, top in zip(probabilities, order, strict=True)]
    return np.array(texts, dtype=object)


def _own_version() -> str:
    try:
        return version(SERVER_NAME)
    except PackageNotFoundError:  # run from a checkout
        return "0"
