"""The parts that /openapi.json refers to: what comes and goes as JSON, the headers, and the problems with their codes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from service.http.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPES

STRING: dict[str, Any] = {"type": "string"}
SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
SHA256: dict[str, Any] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
REQUEST_ID: dict[str, Any] = {"type": "string", "pattern": r"^[A-Za-z0-9_.:\-]{1,64}$"}
MODEL: dict[str, Any] = {
    "name": STRING,
    "version": {"type": "string", "description": "Changes when anything in the bundle does."},
    "precision": {"type": "string", "enum": ["fp32", "bf16"]},
    "preprocessing_sha256": SHA256 | {"description": "The digest of how a photo is made into pixels."},
}


def ref(name: str, kind: str = "schemas") -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def record(description: str, properties: dict[str, Any], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with these properties and no others, required but for the ``optional``."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def described(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return schema | {"description": description}


def problem_answers(*codes: str) -> dict[str, Any]:
    """Status -> an answer with the problems of that status."""
    statuses: dict[int, list[str]] = {}
    for code in codes:
        statuses.setdefault(PROBLEM_TYPES[code][0], []).append(code)
    return {str(status): problem_answer(statuses[status]) for status in sorted(statuses)}


def problem_answer(codes: list[str]) -> dict[str, Any]:
    status = PROBLEM_TYPES[codes[0]][0]
    headers = ["X-Request-ID", *{401: ["WWW-Authenticate"], 405: ["Allow"], 503: ["Retry-After"]}.get(status, [])]
    only = {"properties": {"code": {"enum": codes}, "status": {"const": status}}}
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(f'`{code}`' for code in codes)}.",
        "headers": {name: ref(name, "headers") for name in headers},
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"allOf": [ref("Problem"), only]}}},
    }


def schemas() -> dict[str, Any]:
    """Every named schema."""
    problem = {
        "type": described(STRING | {"format": "uri-reference"}, "Where the code is explained: `/docs#code`."),
        "title": described(STRING, "The code in words."),
        "status": {"type": "integer", "enum": sorted({status for status, _, _ in PROBLEM_TYPES.values()})},
        "detail": described(STRING, "What arrived, what was wanted, what to do."),
        "code": described(STRING | {"enum": list(PROBLEM_TYPES)}, "Stable: what a program should look at."),
    }
    request_id = described(REQUEST_ID, "To be found in the log.")
    failed = {"file": {"type": ["string", "null"]}, "error": ref("ImageProblem")}
    return {
        "Problem": record("An error, as RFC 9457 has it.", problem | {"request_id": request_id}),
        "ImageProblem": record("What is wrong with one photo of several.", problem),
        "Model": record("The model that answered.", MODEL),
        "ModelDetails": _model_details(),
        "Prediction": _prediction(),
        "FailedPrediction": record("A photo of several that could not be classified.", failed),
        "Predictions": record(
            "One row for each photo, in their order.",
            {
                "model": ref("Model"),
                "request_id": request_id,
                "predictions": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"oneOf": [ref("Prediction"), ref("FailedPrediction")]},
                },
            },
        ),
        "Models": record("What is served.", {"models": {"type": "array", "minItems": 1, "items": ref("ModelDetails")}}),
        "Alive": record("The process answers.", {"status": {"const": "alive"}}),
        "Ready": record(
            "The model reproduced its golden outputs, and predictions are served.",
            {
                "status": {"const": "ready"},
                "model": ref("Model"),
                "gallery": described(
                    {"enum": ["ready", "starting", "unavailable"]}, "The gallery's own status; predictions do not wait for it."
                ),
            },
        ),
    }


def _prediction() -> dict[str, Any]:
    pixels = {"type": "integer", "minimum": 1}
    notes = {"type": "array", "items": STRING}
    probabilities = {"type": "object", "additionalProperties": SHARE}
    fields = {
        "file": described({"type": ["string", "null"]}, "The file's name as it was sent, or null."),
        "label": described(STRING, "The most probable class."),
        "confidence": described(SHARE, "Its probability, from 0 to 1."),
        "probabilities": described(probabilities, "Class to probability; with `top_k` only the highest, highest first."),
        "width": described(pixels, "Of the photo that arrived, in pixels."),
        "height": described(pixels, "The same."),
        "format": described(STRING, "JPEG, PNG and so on."),
        "notes": described(notes, "What should be known of how it was read."),
        "crop": described(STRING | {"pattern": "^data:image/png;base64,"}, "With `crop=1`: what the model saw, exactly."),
        "page": described(STRING, "With `SAVE_PREDICTIONS=1`: the address of the photo's page in the gallery."),
    }
    return record("The answer for a photo.", fields, optional=("crop", "page"))


def _model_details() -> dict[str, Any]:
    metrics = "Accuracy, log loss and others: `value` with a 95 % interval, `low` to `high`."
    fields = {
        "merged_from": described(
            {"type": ["string", "null"]}, "The version of the head-only bundle that it was merged from with its base, or null."
        ),
        "backbone": described(STRING, "The network's architecture."),
        "classes": {"type": "array", "items": STRING, "minItems": 1},
        "preprocessing": described({"type": "object"}, "Sizes in pixels, interpolation, mean and standard deviation."),
        "metrics": described({"type": "object"}, metrics),
        "bf16": described({"type": ["object", "null"]}, "What bfloat16 was measured to change, where it was."),
        "precision_reason": described(STRING, "Why it computes in this precision."),
        "tolerance": described({"type": "number"}, "How far the golden answers may be off."),
        "golden_difference": described({"type": "number"}, "How far they were off at the start."),
        "created": described(STRING | {"format": "date-time"}, "When it was trained."),
        "card": described({"type": ["string", "null"]}, "The model card, in Markdown."),
    }
    return record("A model, and all that its bundle says of it.", MODEL | fields)


def headers() -> dict[str, Any]:
    """Every named header of an answer."""
    return {
        "X-Request-ID": {"description": "The request's own, or the one that it was given.", "schema": REQUEST_ID},
        "X-Model-Version": {"description": "The version of the model that answered.", "schema": STRING},
        "Server-Timing": {"description": "Milliseconds of the slowest photo's stages.", "schema": STRING},
        "Retry-After": {"description": "Seconds to wait, where waiting helps.", "schema": {"type": "integer", "minimum": 1}},
        "WWW-Authenticate": {"description": "How to send a key.", "schema": STRING},
        "Allow": {"description": "The methods that are allowed.", "schema": STRING},
    }
