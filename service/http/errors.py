"""Error responses: ``application/problem+json`` (RFC 9457) with a stable code, a sentence and the request id.

This is the only module that turns an exception of the domain (models, images, db, reviews, ...) into an HTTP status. Packages
below HTTP raise their own exceptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from models.errors import ImageError, ImageTooLargeError, TooComplexError, UnsupportedImageError, UserError
from models.preprocess import IMAGE_FORMATS_TEXT
from service.db.errors import (
    DatabaseUnavailableError,
    IncompatibleModelsError,
    InvalidFilterError,
    InvalidReviewError,
    JobConflictError,
    JobQueueFullError,
    NothingToUndoError,
    RecordNotFoundError,
    ReviewConflictError,
)
from service.images.source_folder import ImageMissingError, ImageReplacedError, ImageUnavailableError
from service.images.worker_pool import PoolFullError, PoolTimeoutError

PROBLEM_MEDIA_TYPE = "application/problem+json"


class ProblemType(NamedTuple):
    """The status and title of an error code, and what the client can do about it."""

    status: int
    title: str
    advice: str


PROBLEM_TYPES: dict[str, ProblemType] = {
    "no_image": ProblemType(
        400, "No image found", "Send at least one image: the form field `file`, the request body, or `image` in JSON."
    ),
    "empty_image": ProblemType(400, "Empty file", "The file has no bytes. Check that the client reads it before sending."),
    "bad_json": ProblemType(400, "Invalid JSON", "Correct the JSON. Each operation shows an example."),
    "bad_base64": ProblemType(400, "Invalid base64", "Encode the image's bytes in standard base64."),
    "bad_tensor": ProblemType(
        400, "Invalid tensor", "Check the names, datatypes and shapes of the inputs: `GET /v2/models/{name}` lists them."
    ),
    "bad_form": ProblemType(400, "Invalid form", "Let your HTTP library build the multipart body, including its boundary."),
    "bad_parameter": ProblemType(400, "Invalid parameter", "`detail` names the parameter and its allowed values."),
    "bad_request": ProblemType(400, "Invalid request", "The request is malformed or incomplete. Send it again."),
    "unauthorized": ProblemType(401, "API key required", "Send a valid key: `Authorization: Bearer KEY` or `X-API-Key: KEY`."),
    "admin_disabled": ProblemType(403, "Admin API disabled", "Start the server with `ADMIN_KEYS` set."),
    "cross_site_request": ProblemType(403, "Cross-site request rejected", "Use the gallery pages or a non-browser client."),
    "image_missing": ProblemType(404, "Image not found", "Start the server with `DATA_DIR` set to the evaluated folder."),
    "not_found": ProblemType(404, "Not found", "Check the address against this page."),
    "method_not_allowed": ProblemType(405, "Method not allowed", "The `Allow` header lists the allowed methods."),
    "body_timeout": ProblemType(
        408, "Request body timeout", "The connection was too slow. Send the request again, or send a smaller image."
    ),
    "bundle_incompatible": ProblemType(
        409, "Bundle not compatible", "Check the bundle. If the difference is intended, list it in `allow`."
    ),
    "image_replaced": ProblemType(
        409, "Image file changed", "The file differs from the evaluated one. Evaluate the model again."
    ),
    "job_conflict": ProblemType(409, "Training conflict", "Reload the page of the run to see its current state."),
    "no_previous_bundle": ProblemType(409, "No previous bundle", "Name the bundle in `POST /admin/bundle`."),
    "nothing_to_undo": ProblemType(409, "Nothing to undo", "This image has no review."),
    "name_taken": ProblemType(409, "Name taken", "Choose another name."),
    "dataset_busy": ProblemType(409, "Dataset busy", "Retry when its audit, import or training has ended."),
    "upload_conflict": ProblemType(409, "Upload conflict", "`detail` states how many bytes are there. Continue from there."),
    "review_conflict": ProblemType(
        409, "Review conflict", "Read the other review. To overwrite it, send yours again with its id as `expected_version`."
    ),
    "rollout_conflict": ProblemType(409, "Live model changed", "Reload the page to see which model is live, and decide again."),
    "rollout_in_progress": ProblemType(
        409, "Rollout in progress", "Retry when the current rollout has finished, within seconds."
    ),
    "body_too_large": ProblemType(413, "Request too large", "Send fewer images per request, or smaller files."),
    "dataset_too_large": ProblemType(413, "Dataset full", "Delete photos, or start another dataset."),
    "json_too_large": ProblemType(
        413, "JSON too large", "Send fewer images per request, and tensors as binary data (`binary_tensor_data`)."
    ),
    "too_many_images": ProblemType(413, "Too many images", "Split the images over several requests."),
    "selection_too_large": ProblemType(
        413, "Selection too large", "Add a filter, or let the administrator raise `MAX_SELECTED`."
    ),
    "too_many_pixels": ProblemType(413, "Image too large", "Resize the image first."),
    "uri_too_long": ProblemType(414, "Address too long", "Shorten the address, and send data in the body."),
    "not_an_image": ProblemType(415, "Unsupported image format", f"Use {IMAGE_FORMATS_TEXT}."),
    "unsupported_media_type": ProblemType(415, "Unsupported media type", "Set `Content-Type` to one of the listed types."),
    "bundle_invalid": ProblemType(422, "Invalid bundle", "`detail` states the reason. Copy or export the bundle again."),
    "damaged_image": ProblemType(
        422, "Damaged image", "The image cannot be decoded. Check that it opens elsewhere, and save it again."
    ),
    "image_too_complex": ProblemType(
        422, "Image too complex", "Decoding would take too long or too much memory. Save the image as an ordinary JPEG or PNG."
    ),
    "job_queue_full": ProblemType(429, "Training queue full", "Cancel a waiting run, or start this one later."),
    "headers_too_large": ProblemType(431, "Headers too large", "Send fewer and shorter headers and cookies."),
    "internal_error": ProblemType(
        500, "Internal server error", "Give the administrator the request id. The log has the details."
    ),
    "training_unavailable": ProblemType(
        501, "Training not installed", "Install the packages for training, which the train page lists."
    ),
    "database_unavailable": ProblemType(
        503, "Database unavailable", "Predictions are not affected. The administrator must check the review database."
    ),
    "decoders_stalled": ProblemType(
        503, "Image decoding stalled", "Use another server. If this persists, the administrator must restart the server."
    ),
    "not_ready": ProblemType(503, "Service not ready", "The server is starting. Retry after `Retry-After` seconds."),
    "overloaded": ProblemType(503, "Server overloaded", "Retry after `Retry-After` seconds, with fewer requests at a time."),
    "deadline_exceeded": ProblemType(504, "Deadline exceeded", "The server is busy. Retry later."),
    "storage_full": ProblemType(507, "Disk full", "Delete data that is no longer needed, or add disk space."),
}


class Problem(UserError):  # noqa: N818 - the name in RFC 9457
    """An error response: ``code`` is a key of ``PROBLEM_TYPES``, ``detail`` states what was wrong and what to do."""

    def __init__(self, code: str, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})

    def without_traceback(self) -> Problem:
        """Drop the traceback. Its frames reference image data, and a reference cycle would keep them alive."""
        self.__traceback__ = self.__context__ = None
        return self

    @property
    def status(self) -> int:
        return PROBLEM_TYPES[self.code].status

    @property
    def title(self) -> str:
        return PROBLEM_TYPES[self.code].title

    def to_dict(self, request_id: str | None = None) -> dict[str, Any]:
        """Return the members of RFC 9457 with ``code``, and with ``request_id`` if the problem is the whole response."""
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


# The code of each exception of the domain, and the seconds after which a retry helps. The message becomes the problem's
# ``detail``. Subclasses that are not listed have the code of their base class.
CODES: dict[type[Exception], tuple[str, int | None]] = {
    ImageError: ("damaged_image", None),
    UnsupportedImageError: ("not_an_image", None),
    ImageTooLargeError: ("too_many_pixels", None),
    TooComplexError: ("image_too_complex", None),
    ImageUnavailableError: ("too_many_pixels", None),
    ImageMissingError: ("image_missing", None),
    ImageReplacedError: ("image_replaced", None),
    PoolFullError: ("overloaded", 2),
    PoolTimeoutError: ("deadline_exceeded", None),
    DatabaseUnavailableError: ("database_unavailable", 5),
    RecordNotFoundError: ("not_found", None),
    InvalidFilterError: ("bad_parameter", None),
    IncompatibleModelsError: ("bad_parameter", None),
    InvalidReviewError: ("bad_parameter", None),
    ReviewConflictError: ("review_conflict", None),
    NothingToUndoError: ("nothing_to_undo", None),
    JobConflictError: ("job_conflict", None),
    JobQueueFullError: ("job_queue_full", 60),
}


def problem_from(error: Exception) -> Problem | None:
    """Return the error response for an exception, or None if its class has no code: that exception is a bug."""
    if isinstance(error, Problem):
        return error
    code, retry_after_s = next((CODES[cls] for cls in type(error).__mro__ if cls in CODES), (None, None))
    if code is None:
        return None
    return Problem(code, str(error), headers={"Retry-After": str(retry_after_s)} if retry_after_s else {})


def code_for_status(status: int) -> str:
    """Return the error code for an HTTP error that Flask or Werkzeug raised."""
    known = {
        404: "not_found",
        405: "method_not_allowed",
        408: "body_timeout",
        413: "body_too_large",
        415: "unsupported_media_type",
    }
    return known.get(status, "bad_request" if status < 500 else "internal_error")
