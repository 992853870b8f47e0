"""What the service answers, as an OpenAPI 3.1 document: /openapi.json gives it, and /docs is drawn from it."""

from __future__ import annotations

from typing import Any

from models.preprocess import IMAGE_FORMATS_TEXT
from service.api import openapi_admin, openapi_inference_protocol
from service.api.openapi_examples import models_samples, page_samples, predict_samples
from service.api.openapi_gallery import gallery_paths
from service.api.openapi_operations import answer, get, said
from service.api.openapi_schemas import STRING, described, headers, problem_answer, problem_answers, ref, schemas
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings

API_VERSION = "1.0.0"
BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
BASE64: dict[str, Any] = {"type": "string", "contentEncoding": "base64"}
READING = ("empty_image", "too_many_pixels", "not_an_image", "damaged_image", "image_too_complex")
SENDING = ("unsupported_media_type", "body_timeout", "body_too_large", "bad_request", "bad_form", "too_many_images", "no_image")
BAD_JSON = ("bad_json", "json_too_large", "bad_base64")
FAILING = ("internal_error", "not_ready", "overloaded", "deadline_exceeded")
ABOUT = """\
Send a photo, get the probability of each class. Every answer carries a request id, every problem a stable code.

A request may bring its own `X-Request-ID` (up to 64 letters, digits and `_ . : -`); otherwise it is given one.
A path or a query with a NUL character is answered 400. Any GET can be a HEAD.
Unknown addresses are answered 404 and other methods 405, as problems like the others.
"""


def document(settings: Settings, url: str) -> dict[str, Any]:
    """The whole document; ``url`` is where the service is, without a slash at the end."""
    keyed: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Image classification",
            "version": API_VERSION,
            "summary": "Photos in, probabilities out.",
            "description": ABOUT,
        },
        "servers": [{"url": url}],
        "tags": [
            {"name": "Classification", "description": "Photos and the model that judges them."},
            {"name": "Gallery", "description": "What the model gets right and wrong, and what people decided about it."},
            {"name": "Operation", "description": "For orchestrators and Prometheus."},
            {"name": openapi_admin.TAG, "description": openapi_admin.ABOUT},
            {"name": openapi_inference_protocol.TAG, "description": openapi_inference_protocol.ABOUT},
            {"name": "Pages", "description": "For people and for tools that read this."},
        ],
        "paths": {
            "/predict": {"post": _predict(settings, url) | {"security": keyed if settings.api_keys else [{}, *keyed]}},
            "/models": {"get": _models(url)},
            **_operation_paths(),
            **openapi_admin.admin_paths(settings),
            **openapi_inference_protocol.oip_paths(settings),
            **_page_paths(settings, url),
            **gallery_paths(keyed if settings.api_keys else [{}, *keyed]),
        },
        "components": {
            "schemas": schemas() | openapi_admin.admin_schemas() | openapi_inference_protocol.oip_schemas(),
            "headers": headers(),
            "responses": {
                "NotFound": problem_answer(["not_found"]),
                "MethodNotAllowed": problem_answer(["method_not_allowed"]),
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _predict(settings: Settings, url: str) -> dict[str, Any]:
    limits = (
        f"At most {settings.max_images} photos and {settings.max_body_mb:g} MiB in a request, "
        f"and {settings.max_megapixels:g} million pixels in a photo."
    )
    who = "A key is wanted." if settings.api_keys else "No key is wanted here."
    return {
        "operationId": "predict",
        "tags": ["Classification"],
        "summary": "Classify photos",
        "description": f"One photo or several, in any of the three forms. {limits} {who}\n\nOf several photos each has its own "
        "row, with the answer or its own `error`; a single photo's problem is the answer's. A photo is turned as its EXIF data "
        "says; of an animation the first frame counts. "
        + (
            f"Photos are kept for {settings.retention_days:g} days at most"
            if settings.save_predictions
            else "Photos are not stored"
        )
        + (
            f"; the crops of the last {settings.shadow_samples} stay in memory, to compare the next bundle with this one."
            if settings.shadow_samples
            else "."
        ),
        "parameters": [
            {
                "name": "top_k",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
                "description": "Give only so many classes, the most probable first; without it, all in the model's order.",
            },
            {
                "name": "crop",
                "in": "query",
                "schema": {"type": "string", "enum": ["0", "1"], "default": "0"},
                "description": "With 1, each row has `crop`: a data: URL of the PNG that the model saw.",
            },
        ],
        "requestBody": {"required": True, "content": _photo_forms(settings)},
        "responses": {
            "200": {
                "description": "The answers, in the photos' order.",
                "headers": {name: ref(name, "headers") for name in ("X-Request-ID", "X-Model-Version", "Server-Timing")},
                "content": {"application/json": {"schema": ref("Predictions"), "example": EXAMPLE}},
            },
            **problem_answers("unauthorized", "bad_parameter", *SENDING, *BAD_JSON, *READING, *FAILING),
        },
        "x-codeSamples": predict_samples(url, needs_key=bool(settings.api_keys)),
    }


def _photo_forms(settings: Settings) -> dict[str, Any]:
    files = {"type": "array", "items": BINARY, "minItems": 1, "maxItems": settings.max_images}
    photo = {"type": "object", "properties": {"b64": BASE64}, "required": ["b64"]}
    one = {"type": "object", "properties": {"image": described(BASE64, "Or a data: URL.")}, "required": ["image"]}
    row = described({"anyOf": [photo, {}]}, "What is no photo is answered with an error of its own.")
    instances = {"type": "array", "items": row, "minItems": 1, "maxItems": settings.max_images}
    several = {"type": "object", "properties": {"instances": instances}, "required": ["instances"]}
    form = {"type": "object", "properties": {"file": files}, "minProperties": 1}
    return {
        "multipart/form-data": {"schema": described(form, "A form; every file in it is a photo, whatever its field's name.")},
        "image/*": {"schema": described(BINARY, "A photo's bytes, as they are.")},
        "application/octet-stream": {"schema": described(BINARY, "The same, under a name that says less.")},
        "application/json": {
            "schema": described({"anyOf": [one, several]}, "Base64 in JSON: `image` for one photo, `instances` for several."),
            "examples": {
                "one": {"summary": "one photo", "value": {"image": "/9j/4AAQSkZJRgABAQ..."}},
                "several": {"summary": "several", "value": {"instances": [{"b64": "/9j/4AAQ..."}, {"b64": "iVBORw0KGgo..."}]}},
            },
        },
    }


def _models(url: str) -> dict[str, Any]:
    good = answer("The model, its classes, its figures and its card.", "application/json", ref("Models"))
    return get("models", "Classification", "Describe the model", good, "internal_error", "not_ready") | {
        "x-codeSamples": models_samples(url)
    }


def _operation_paths() -> dict[str, Any]:
    live = answer("It is alive.", "application/json", ref("Alive"))
    ready = answer("It is ready.", "application/json", ref("Ready"))
    metrics = answer("Prometheus's text format.", "text/plain", STRING)
    return {
        "/health/live": {"get": get("live", "Operation", "Does the process answer", live)},
        "/health/ready": {
            "get": get("ready", "Operation", "Is the model loaded and checked", ready, "not_ready", "decoders_stalled")
        },
        "/metrics": {"get": get("metrics", "Operation", "Counters and histograms", metrics)},
    }


def _page_paths(settings: Settings, url: str) -> dict[str, Any]:
    page = answer("The page.", "text/html", STRING)
    file = answer("The file; one that is asked for with its version, `?v=`, can be kept for ever.", "*/*", BINARY)
    name = {"name": "filename", "in": "path", "required": True, "schema": STRING, "description": "Its name, without a version."}
    fetch = get("static", "Pages", "A file of the pages", file)
    fetch["responses"] |= {"404": ref("NotFound", "responses"), **problem_answers("bad_parameter")}
    openapi = answer("This document.", "application/json", {"type": "object"})
    return {
        "/": {
            "get": said(get("home", "Pages", "The page that takes photos", page, "internal_error", "not_ready")),
            "post": said(_form_post(settings, url)),
        },
        "/model": {"get": said(get("model", "Pages", "The model card", page, "internal_error", "not_ready"))},
        "/docs": {"get": get("docs", "Pages", "This, to be read", page)},
        "/openapi.json": {"get": get("openapi", "Pages", "This document", openapi)},
        "/static/{filename}": {"get": fetch | {"parameters": [name]}},
    }


def _form_post(settings: Settings, url: str) -> dict[str, Any]:
    files = {"type": "array", "items": BINARY, "maxItems": settings.max_images}
    form = {"type": "object", "properties": {"file": files, "key": described(STRING, "Where a key is wanted.")}}
    return {
        "operationId": "classify",
        "tags": ["Pages"],
        "summary": "The page's form",
        "description": "For browsers that run no script: the answer is the page, and so is a problem, with its own status.",
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form | {"minProperties": 1}}}},
        "responses": {
            "200": answer("The page with the answers.", "text/html", STRING),
            **problem_answers("unauthorized", *SENDING, *READING, *FAILING),
        },
        "x-codeSamples": page_samples(url, needs_key=bool(settings.api_keys)),
    }


EXAMPLE = {
    "model": {"name": "dogs-vs-cats", "version": "2d29590a4683", "precision": "bf16", "preprocessing_sha256": "a5" * 32},
    "request_id": "1c6f3f0b6d9a4e0e8f1a2b3c4d5e6f70",
    "predictions": [
        {
            "file": "photo.jpg",
            "label": "cats",
            "confidence": 0.9921875,
            "probabilities": {"cats": 0.9921875, "dogs": 0.0078125},
            "width": 1024,
            "height": 768,
            "format": "JPEG",
            "notes": [],
        },
        {
            "file": "notes.txt",
            "error": {
                "type": "/docs#not_an_image",
                "title": PROBLEM_TYPES["not_an_image"].title,
                "status": 415,
                "detail": f"The photo is not a picture that can be read; send {IMAGE_FORMATS_TEXT}.",
                "code": "not_an_image",
            },
        },
    ],
}
