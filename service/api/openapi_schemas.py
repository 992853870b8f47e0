"""The parts that /openapi.json refers to: what comes and goes as JSON, the headers, and the problems with their codes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from models.preprocess import IMAGE_FORMATS_TEXT
from service.http.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPES

# What the one who asks can do about each code.
ADVICE = {
    "no_image": "Send at least one photo: a form's field `file`, a body, or `image` in JSON.",
    "empty_image": "The file has no bytes; look whether it was read before it was sent.",
    "bad_json": "Mend the JSON; its form is shown above.",
    "bad_base64": "Encode the photo's bytes again, in standard base64.",
    "bad_tensor": "Look at the inputs' names, datatypes and shapes: `GET /v2/models/{name}`.",
    "bad_form": "Let a library or the browser write the form, its boundary among it.",
    "bad_parameter": "`detail` names the parameter and what it can be.",
    "bad_request": "The body broke off or is malformed; send it again, whole.",
    "unauthorized": "Send a key that is known here: `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
    "cross_site_request": "A decision is taken from the gallery's own pages, or from a program that is no browser.",
    "image_missing": "Start the server with `DATA_DIR` set to the folder of photos that was evaluated.",
    "image_replaced": "Another file lies where the photo was; evaluate again.",
    "admin_disabled": "Set ADMIN_KEYS where the server is started.",
    "not_found": "Look up the address on this page.",
    "method_not_allowed": "The answer's header `Allow` lists the methods.",
    "review_conflict": "Read the other decision, and send yours again with its id as `expected_version` to overrule it.",
    "nothing_to_undo": "There is no decision about this photo; decide first.",
    "body_timeout": "The connection was too slow for the body; send it again, or a smaller photo.",
    "rollout_in_progress": "Ask again when it is done; a swap takes seconds.",
    "bundle_incompatible": "Look at the bundle; where it is meant to differ, say so in `allow`.",
    "no_previous_bundle": "Name the bundle: `POST /admin/bundle`.",
    "body_too_large": "Send fewer photos in a request, or smaller files.",
    "json_too_large": "Send fewer photos in a request, and tensors as bytes (`binary_tensor_data`).",
    "too_many_images": "Send them in several requests.",
    "too_many_pixels": "Scale the photo down first.",
    "unsupported_media_type": "Set the header `Content-Type` to one of those that are listed above.",
    "not_an_image": f"Send {IMAGE_FORMATS_TEXT}.",
    "damaged_image": "The picture cannot be decoded; look whether it opens elsewhere, and save it anew.",
    "image_too_complex": "Decoding it would take too long or too much memory; save it again as a normal JPEG or PNG.",
    "bundle_invalid": "`detail` says what is wrong with it; copy or export it again.",
    "internal_error": "Tell the operator the request id; the log has more under it.",
    "not_ready": "The model is being loaded; send it again after `Retry-After` seconds.",
    "decoders_stalled": "Send requests to another server; where it lasts, the operator has to restart this one.",
    "database_unavailable": "Predictions go on; the operator has to look after the database.",
    "overloaded": "Send it again after `Retry-After` seconds, and fewer at a time.",
    "deadline_exceeded": "The server is busy; send it again later.",
}

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
        "status": {"type": "integer", "enum": sorted({status for status, _ in PROBLEM_TYPES.values()})},
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
        "Ready": record("The model gave its golden answers.", {"status": {"const": "ready"}, "model": ref("Model")}),
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
    }
    return record("The answer for a photo.", fields, optional=("crop",))


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
