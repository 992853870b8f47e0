"""The Open Inference Protocol (KServe's version 2, over REST): the same photos and the same answers as /predict.

https://github.com/kserve/open-inference-protocol, with Triton's extensions ``binary_tensor_data`` and ``classification``.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from flask import Blueprint, Response, g, jsonify, request
from numpy.typing import NDArray

from service.api.predict import Prediction, classify
from service.api.tensor_codec import InputTensor, RequestedOutput, encode_response, parse_request, tensor_problem
from service.context import services
from service.http import REJECTION
from service.http.errors import Problem
from service.http.request_body import read_body
from service.http.security import require_key
from service.http.uploads import Upload, upload_from_base64
from service.inference.model_manager import LoadedModel, ModelManager

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
    _served().check_ready()
    return jsonify(ready=True)


@bp.get("/models/<name>", defaults={"version": None})
@bp.get("/models/<name>/versions/<version>")
def metadata(name: str, version: str | None) -> Response:
    model = _found(name, version)
    seen, classes = model.bundle.preprocessing, len(model.bundle.classes)
    return jsonify(
        name=model.bundle.name,
        versions=[model.bundle.version],
        platform="onnx_onnxv1",
        inputs=[
            {"name": "images", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, seen.input_px, seen.input_px, seen.channels]},
        ],
        outputs=[
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    )


@bp.get("/models/<name>/ready", defaults={"version": None})
@bp.get("/models/<name>/versions/<version>/ready")
def model_ready(name: str, version: str | None) -> Response:
    model = _served().check_ready()
    _check(model, name, version)
    return jsonify(name=model.bundle.name, ready=True)


@bp.post("/models/<name>/infer", defaults={"version": None})
@bp.post("/models/<name>/versions/<version>/infer")
def infer(name: str, version: str | None) -> Response:
    if refusal := request.environ.get(REJECTION):
        raise refusal
    settings = services().settings
    g.key_name = require_key(request, settings)
    preprocessing = _found(name, version).bundle.preprocessing
    wanted = parse_request(read_body(request, settings), _json_bytes(), settings, preprocessing)
    model, predictions = classify(_uploads(wanted.input), all_or_none=True)
    _check(model, name, version)  # it may have been exchanged meanwhile
    head = {"model_name": model.bundle.name, "model_version": model.bundle.version}
    if wanted.id is not None:
        head["id"] = wanted.id
    values = np.stack([_probabilities(prediction) for prediction in predictions])
    body, json_bytes = encode_response(head, [(asked, _output(asked, values, model)) for asked in wanted.outputs])
    result = Response(body, mimetype="application/json" if json_bytes is None else "application/octet-stream")
    result.headers["X-Model-Version"] = model.bundle.version
    if json_bytes is not None:
        result.headers[JSON_LENGTH_HEADER] = str(json_bytes)
    return result


def is_protocol_path(path: str) -> bool:
    """Whether a path is the protocol's, so that its errors have the protocol's form."""
    return path == "/v2" or path.startswith("/v2/")


def error_response(problem: Problem) -> Response:
    """A problem as the protocol has it."""
    result = jsonify(error=problem.detail)
    result.status_code = problem.status
    result.headers.update(problem.headers)
    return result


def _served() -> ModelManager:
    return services().model_manager


def _found(name: str, version: str | None) -> LoadedModel:
    model = _served().get()
    _check(model, name, version)
    return model


def _check(model: LoadedModel, name: str, version: str | None) -> None:
    if name != model.bundle.name or version not in (None, model.bundle.version):
        asked = name if version is None else f"{name}, version {version}"
        raise Problem("not_found", f"There is no {asked} here; {model.bundle.name}, version {model.bundle.version}, is served.")


def _json_bytes() -> int | None:
    text = request.headers.get(JSON_LENGTH_HEADER)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise tensor_problem(f"{JSON_LENGTH_HEADER} is {text[:40]!r}; it must be a whole number.")
    return int(text)


def _uploads(given: InputTensor) -> list[Upload]:
    rows: list[Any] = list(given.pixels if given.pixels is not None else given.elements or [])
    if not rows:
        raise Problem("no_image", f"The tensor {given.name} is empty; send at least one photo.")
    return [_upload(row) for row in rows]


def _upload(row: Any) -> Upload:
    if isinstance(row, bytes):
        return Upload(None, row)
    return upload_from_base64(row) if isinstance(row, str) else Upload(None, b"", pixels=row)


def _probabilities(prediction: Prediction) -> NDArray[np.float32]:
    assert prediction.result is not None
    return prediction.result.probabilities


def _output(asked: RequestedOutput, values: NDArray[np.float32], model: LoadedModel) -> NDArray[Any]:
    """The tensor that is asked for, of the probabilities (N, classes)."""
    names = np.array(model.bundle.classes, dtype=object)
    if asked.name == "label":
        return names[values.argmax(axis=1)]
    if not asked.classes:
        return values
    order = np.argsort(-values, axis=1, kind="stable")[:, : asked.classes]
    texts = [[f"{row[i]:f}:{i}:{names[i]}" for i in best] for row, best in zip(values, order, strict=True)]
    return np.array(texts, dtype=object)


def _own_version() -> str:
    try:
        return version(SERVER_NAME)
    except PackageNotFoundError:  # run from its folder
        return "0"
