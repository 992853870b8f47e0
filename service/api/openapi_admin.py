"""What /openapi.json says of /admin: which bundle serves, another in its place, and back again."""

from __future__ import annotations

from typing import Any

from service.api.openapi_schemas import STRING, described, problem_answers, record, ref
from service.rollout.agreement import ALLOWED_DIFFERENCES
from service.settings import Settings

TAG = "Administration"
ABOUT = "Another bundle in the place of the one that serves; for those who have one of `ADMIN_KEYS`."
CLOSED = ("unauthorized", "admin_disabled", "internal_error")
SWAPPING = (*CLOSED, "rollout_in_progress", "bundle_invalid", "not_ready")


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
                "operationId": "getActiveBundle",
                "summary": "Which bundle serves, and what was refused",
                "responses": _answers(*CLOSED),
            },
            "post": keyed
            | {
                "operationId": "activateBundle",
                "summary": "Serve another bundle",
                "description": "It is loaded beside the one that serves. Its files and golden answers are checked, its classes "
                f"have to be the same, and it has to give the same label to {settings.min_agreement:.0%} of the last "
                f"{settings.shadow_samples} answered photos. Then it serves, and no request fails for it; else it is refused, "
                "and nothing changes. The response is sent when this worker serves it; `converged` tells when all do.",
                "requestBody": body,
                "responses": _answers(*SWAPPING, *reading, "bundle_incompatible"),
            },
        },
        "/admin/rollback": {
            "post": keyed
            | {
                "operationId": "rollBackBundle",
                "summary": "Serve the bundle that did before",
                "description": "It is loaded and checked as at a start, but not compared. A second time goes forward again.",
                "responses": _answers(*SWAPPING, "no_previous_bundle"),
            }
        },
    }


def admin_schemas() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    when = STRING | {"format": "date-time"}
    agreement = record(
        "How far it agreed with the one before on photos that were answered lately.",
        {
            "compared": described(count, "Photos."),
            "agreed": described(count, "Of these, with the same label."),
            "max_difference": {"type": "number", "description": "Of a probability."},
            "skipped_reason": described({"type": ["string", "null"]}, "Why nothing was compared, where nothing was."),
        },
    )
    chosen = {
        "bundle": described(STRING, "Its folder."),
        "name": STRING,
        "version": STRING,
        "actor": described(STRING, "The key's name; `BUNDLE` for the setting, or the link that it leads through."),
        "time": when,
        "agreement": {"oneOf": [agreement, {"type": "null"}]},
    }
    refused = {"bundle": STRING, "code": STRING, "reason": STRING, "actor": STRING, "time": when}
    workers = {"type": "array", "items": record("A worker.", {"pid": count, "version": STRING})}
    return {
        "SelectedBundle": record("A bundle that was chosen to serve.", chosen),
        "RejectedBundle": record("A bundle that was not taken, and why.", refused),
        "RolloutState": record(
            "What serves, what did before, and what was refused last, since the server was started.",
            {
                "active": {"oneOf": [ref("SelectedBundle"), {"type": "null"}]},
                "previous": {"oneOf": [ref("SelectedBundle"), {"type": "null"}]},
                "last_rejection": {"oneOf": [ref("RejectedBundle"), {"type": "null"}]},
                "converged": {"type": "boolean", "description": "Whether every worker serves it."},
                "survives_restart": {
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
        "content": {"application/json": {"schema": ref("RolloutState")}},
    }
    return {"200": served, **problem_answers(*codes)}
