"""What /openapi.json says of /admin: which bundle serves, another in its place, and back again."""

from __future__ import annotations

from typing import Any

from service.api.openapi_schemas import STRING, described, problem_answers, record, ref
from service.rollout.agreement import ALLOWED_DIFFERENCES
from service.settings import Settings

TAG = "Administration"
ABOUT = "Another bundle in the place of the one that serves; for those who have one of `ADMIN_KEYS`."
CLOSED = ("unauthorized", "admin_closed", "internal_error")
SWAPPING = (*CLOSED, "swap_in_progress", "bundle_refused", "not_ready")


def admin_paths(settings: Settings) -> dict[str, Any]:
    keyed = {"tags": [TAG], "security": [{"bearer": []}, {"apiKey": []}]}
    example = {"bundle": "2026-11-21", "allow": []}
    form = record(
        f"The bundle's folder, which lies below {settings.resolved_bundle_root.name}/ (the setting `BUNDLE_ROOT`).",
        {
            "bundle": described(STRING | {"minLength": 1}, "A path there, or an absolute one."),
            "allow": {
                "type": "array",
                "items": {"type": "string", "enum": list(ALLOWED_DIFFERENCES)},
                "description": "What may differ.",
            },
        },
        optional=("allow",),
    )
    body = {"required": True, "content": {"application/json": {"schema": form, "example": example}}}
    reading = ("bad_json", "json_too_large", "bad_request", "body_timeout", "body_too_large", "unsupported_media_type")
    return {
        "/admin/bundle": {
            "get": keyed
            | {
                "operationId": "servedBundle",
                "summary": "Which bundle serves, and what was refused",
                "responses": _answers(*CLOSED),
            },
            "post": keyed
            | {
                "operationId": "chooseBundle",
                "summary": "Serve another bundle",
                "description": "It is loaded beside the one that serves. Its files and golden answers are checked, its classes "
                f"have to be the same, and it has to give the same label to {settings.min_agreement:.0%} of the last "
                f"{settings.shadow_samples} answered photos. Then it serves, and no request fails for it; else it is refused, "
                "and nothing changes. The answer comes when the worker that was asked serves it; `settled` tells when all do.",
                "requestBody": body,
                "responses": _answers(*SWAPPING, *reading, "bundle_differs"),
            },
        },
        "/admin/rollback": {
            "post": keyed
            | {
                "operationId": "rollBack",
                "summary": "Serve the bundle that did before",
                "description": "It is loaded and checked as at a start, but not compared. A second time goes forward again.",
                "responses": _answers(*SWAPPING, "nothing_before"),
            }
        },
    }


def admin_schemas() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    when = STRING | {"format": "date-time"}
    min_agreement = record(
        "How far it agreed with the one before on photos that were answered lately.",
        {
            "compared": described(count, "Photos."),
            "agreed": described(count, "Of these, with the same label."),
            "largest_difference": {"type": "number", "description": "Of a probability."},
            "left_out": described({"type": ["string", "null"]}, "Why nothing was compared, where nothing was."),
        },
    )
    chosen = {
        "bundle": described(STRING, "Its folder."),
        "name": STRING,
        "version": STRING,
        "by": described(STRING, "The key's name; `BUNDLE` for the setting, or the link that it leads through."),
        "at": when,
        "agreement": {"oneOf": [min_agreement, {"type": "null"}]},
    }
    refused = {"bundle": STRING, "code": STRING, "why": STRING, "by": STRING, "at": when}
    workers = {"type": "array", "items": record("A worker.", {"process": count, "version": STRING})}
    return {
        "ChosenBundle": record("A bundle that was chosen to serve.", chosen),
        "RefusedBundle": record("A bundle that was not taken, and why.", refused),
        "ServedBundle": record(
            "What serves, what did before, and what was refused last, since the server was started.",
            {
                "serving": {"oneOf": [ref("ChosenBundle"), {"type": "null"}]},
                "before": {"oneOf": [ref("ChosenBundle"), {"type": "null"}]},
                "refusal": {"oneOf": [ref("RefusedBundle"), {"type": "null"}]},
                "settled": {"type": "boolean", "description": "Whether every worker serves it."},
                "lasts": {
                    "type": "boolean",
                    "description": "Whether it is what `BUNDLE` leads to: what a restart would serve.",
                },
                "workers": workers,
            },
        ),
    }


def _answers(*codes: str) -> dict[str, Any]:
    served = {
        "description": "What serves now.",
        "headers": {"X-Request-ID": ref("X-Request-ID", "headers")},
        "content": {"application/json": {"schema": ref("ServedBundle")}},
    }
    return {"200": served, **problem_answers(*codes)}
