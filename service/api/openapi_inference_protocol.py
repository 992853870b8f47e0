"""What /openapi.json says of /v2, the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from service.api.openapi_schemas import STRING, described, problem_answers, record, ref
from service.settings import Settings

TAG = "Open Inference Protocol"
ABOUT = "KServe's version 2 over REST, for clients that speak it, such as `tritonclient`. Errors are `error`, a sentence."
INFERRING = (
    "unauthorized", "bad_parameter", "bad_json", "json_too_large",
    "bad_tensor", "bad_base64", "bad_request", "body_timeout", "body_too_large", "too_many_images",
    "no_image", "unsupported_media_type", "empty_image", "too_many_pixels", "not_an_image", "damaged_image",
    "image_too_complex", "internal_error", "not_ready", "overloaded", "deadline_exceeded",
)  # fmt: skip

READINESS = ("not_ready", "decoders_stalled")


def oip_paths(settings: Settings) -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": STRING, "description": "The bundle's name."}
    version = {"name": "version", "in": "path", "required": True, "schema": STRING, "description": "The bundle's version."}
    paths: dict[str, Any] = {
        "/v2": {"get": _get("oipServer", "What this server is", "ServerMetadata")},
        "/v2/health/live": {"get": _get("oipLive", "Does the process answer", "ServerLive")},
        "/v2/health/ready": {"get": _get("oipReady", "Is the model loaded and checked", "ServerReady", *READINESS)},
    }
    for path, more, parameters in (("", "", [name]), ("/versions/{version}", "Version", [name, version])):
        at = f"/v2/models/{{name}}{path}"
        missing = ("bad_parameter", "not_found", "not_ready")
        described_by = _get(f"oipModel{more}", "The model's inputs and outputs", "TensorModel", *missing)
        ready = _get(f"oipModelReady{more}", "Is the model ready", "ModelReady", "not_found", *READINESS)
        paths[at] = {"get": described_by | {"parameters": parameters}}
        paths[f"{at}/ready"] = {"get": ready | {"parameters": parameters}}
        paths[f"{at}/infer"] = {"post": _infer(settings, f"oipInfer{more}") | {"parameters": parameters}}
    return paths


def oip_schemas() -> dict[str, Any]:
    texts = {"type": "array", "items": STRING}
    tensor = record("A tensor's form.", {"name": STRING, "datatype": STRING, "shape": _array("integer")})
    yes = {"type": "boolean"}
    output = record(
        "A tensor: its values as `data`, or behind the JSON as so many bytes as `parameters` says.",
        {
            "name": STRING,
            "datatype": STRING,
            "shape": _array("integer"),
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
        optional=("data", "parameters"),
    )
    inferred = {"model_name": STRING, "model_version": STRING, "id": STRING, "outputs": {"type": "array", "items": output}}
    tensors = {"type": "array", "items": tensor}
    model = {"name": STRING, "versions": texts, "platform": STRING, "inputs": tensors, "outputs": tensors}
    return {
        "OipError": record("What was wrong.", {"error": STRING}),
        "ServerMetadata": record("This server.", {"name": STRING, "version": STRING, "extensions": texts}),
        "ServerLive": record("It is alive.", {"live": yes}),
        "ServerReady": record("It is ready.", {"ready": yes}),
        "ModelReady": record("The model is ready.", {"name": STRING, "ready": yes}),
        "TensorModel": record("What goes in, one of the inputs, and what comes out.", model),
        "InferenceRequest": _request(),
        "InferenceResponse": record("The outputs.", inferred, optional=("id",)),
    }


def _request() -> dict[str, Any]:
    tensor = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": ["images", "pixels"]},
            "datatype": {"type": "string", "enum": ["BYTES", "UINT8"]},
            "shape": _array("integer"),
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
        "required": ["name", "datatype", "shape"],
    }
    wanted = {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": ["probabilities", "label"]}, "parameters": {"type": "object"}},
        "required": ["name"],
    }
    return {
        "type": "object",
        "description": "One input; without `outputs`, both are answered.",
        "properties": {
            "id": STRING,
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "outputs": {"type": "array", "items": wanted},
            "parameters": {"type": "object"},
        },
        "required": ["inputs"],
    }


def _infer(settings: Settings, operation: str) -> dict[str, Any]:
    keyed: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
    photo = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": ["/9j/4AAQSkZJRgABAQ..."]}]}
    bytes_behind = described(STRING | {"format": "binary"}, "JSON, and tensors as bytes behind it (`binary_tensor_data`).")
    length = {
        "description": "Where tensors follow as bytes: the length of the JSON before them.",
        "schema": {"type": "integer", "minimum": 0},
    }
    answers = _errors("not_found", *INFERRING)
    answers["200"] = {
        "description": "The outputs, in the photos' order.",
        "headers": {
            **{name: ref(name, "headers") for name in ("X-Request-ID", "X-Model-Version")},
            "Inference-Header-Content-Length": length,
        },
        "content": {
            "application/json": {"schema": ref("InferenceResponse")},
            "application/octet-stream": {"schema": bytes_behind},
        },
    }
    return {
        "operationId": operation,
        "tags": [TAG],
        "summary": "Classify photos or pixels",
        "description": f"`images`, BYTES [N]: encoded photos, in JSON as base64. Or `pixels`, UINT8 [N, H, W, C], as the model "
        f"takes them. At most {settings.max_images}. One bad photo refuses all, as the protocol has no single errors. "
        "With `classification` of probabilities, the highest so many as text, `value:index:label`.",
        "security": keyed if settings.api_keys else [{}, *keyed],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": ref("InferenceRequest"), "example": photo},
                "application/octet-stream": {"schema": bytes_behind},
            },
        },
        "responses": answers,
    }


def _get(operation: str, summary: str, schema: str, *codes: str) -> dict[str, Any]:
    answer = {
        "description": "As the protocol has it.",
        "headers": {"X-Request-ID": ref("X-Request-ID", "headers")},
        "content": {"application/json": {"schema": ref(schema)}},
    }
    return {"operationId": operation, "tags": [TAG], "summary": summary, "responses": {"200": answer, **_errors(*codes)}}


def _errors(*codes: str) -> dict[str, Any]:
    """The problems, said in the protocol's form."""
    answers = problem_answers(*codes)
    for answer in answers.values():
        answer["content"] = {"application/json": {"schema": ref("OipError")}}
    return answers


def _array(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": kind}}
