"""Errors as an answer: ``application/problem+json`` (RFC 9457), each with a stable code, a sentence and the request id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from models.errors import UserError

PROBLEM_MEDIA_TYPE = "application/problem+json"

# Every code that an answer can carry: its status, and its title. docs.html and /openapi.json list them.
PROBLEM_TYPES: dict[str, tuple[int, str]] = {
    "no_image": (400, "No photo arrived"),
    "empty_image": (400, "The file is empty"),
    "bad_json": (400, "The JSON cannot be read"),
    "bad_base64": (400, "The base64 cannot be read"),
    "bad_tensor": (400, "The tensor is not what is taken"),
    "bad_form": (400, "The form cannot be read"),
    "bad_parameter": (400, "A parameter has a wrong value"),
    "bad_request": (400, "The request cannot be read"),
    "unauthorized": (401, "A key is wanted"),
    "cross_site_request": (403, "Another site sent this"),
    "image_missing": (404, "The photo is not in the folder"),
    "admin_disabled": (403, "There is no administration here"),
    "not_found": (404, "There is nothing here"),
    "method_not_allowed": (405, "The method is not allowed here"),
    "image_replaced": (409, "The photo was replaced"),
    "review_conflict": (409, "Somebody else has decided"),
    "nothing_to_undo": (409, "There is nothing to undo"),
    "body_timeout": (408, "The body did not arrive in time"),
    "rollout_in_progress": (409, "Another bundle is being loaded"),
    "bundle_incompatible": (409, "The bundle does not follow the one that serves"),
    "no_previous_bundle": (409, "There is nothing to go back to"),
    "body_too_large": (413, "The body is too large"),
    "json_too_large": (413, "Too many JSON values"),
    "too_many_images": (413, "Too many photos"),
    "too_many_pixels": (413, "The photo has too many pixels"),
    "unsupported_media_type": (415, "The media type is not supported"),
    "not_an_image": (415, "The file is not a picture"),
    "damaged_image": (422, "The picture is damaged"),
    "image_too_complex": (422, "The image is too complex"),
    "bundle_invalid": (422, "The bundle cannot be served"),
    "internal_error": (500, "Something went wrong here"),
    "not_ready": (503, "Not ready yet"),
    "decoders_stalled": (503, "Image decoding is stalled"),
    "database_unavailable": (503, "The review database cannot be used"),
    "overloaded": (503, "The server is overloaded"),
    "deadline_exceeded": (504, "The answer took too long"),
}


class Problem(UserError):  # noqa: N818 - RFC 9457 calls it so
    """A refusal with its ``code`` of ``PROBLEM_TYPES``; ``detail`` says what arrived, what was wanted and what to do."""

    def __init__(self, code: str, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})

    def without_traceback(self) -> Problem:
        """Forget the way that it came: its frames hold photos' bytes, and would until the next collection of cycles."""
        self.__traceback__ = self.__context__ = None
        return self

    @property
    def status(self) -> int:
        return PROBLEM_TYPES[self.code][0]

    @property
    def title(self) -> str:
        return PROBLEM_TYPES[self.code][1]

    def to_dict(self, request_id: str | None = None) -> dict[str, Any]:
        """The members of RFC 9457, with ``code`` and, where it stands for a whole answer, ``request_id``."""
        members = {
            "type": f"/docs#{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        return members | ({"request_id": request_id} if request_id else {})

    def to_json(self, request_id: str) -> bytes:
        return json.dumps(self.to_dict(request_id)).encode()

    @property
    def status_line(self) -> str:
        return f"{self.status} {HTTPStatus(self.status).phrase}"


def code_for_status(status: int) -> str:
    """The code for an error that the framework found: 404, 405 and so on."""
    known = {
        404: "not_found",
        405: "method_not_allowed",
        408: "body_timeout",
        413: "body_too_large",
        415: "unsupported_media_type",
    }
    return known.get(status, "bad_request" if status < 500 else "internal_error")
