"""The photos of a request, in whichever form they came: multipart, a raw body, or base64 in JSON."""

from __future__ import annotations

import base64
import binascii
import socket
from dataclasses import dataclass, field
from typing import Any

from flask import Request

from models.runtime.openvino_engine import Pixels
from service.http.errors import Problem
from service.http.json_body import OTHER_VALUES, parse_json
from service.http.multipart_form import parse_form
from service.http.request_body import read_body
from service.settings import Settings

VALUES_PER_PHOTO = 16  # of its object in `instances`: what other clients say of a photo beside its bytes
STRIDE = 61  # a prime, so that it falls on other columns in each row of pixels that are not compressed
ACCEPTED_FORMATS = "send multipart/form-data with the field `file`, a photo as the body (image/*), or JSON"


@dataclass(frozen=True)
class Upload:
    """A photo's bytes as they arrived, or the reason why there are none; ``name`` is the sender's, or None.

    Where a program made the ``pixels`` (H, W, C) uint8 itself, there are those in place of bytes.
    """

    name: str | None
    data: bytes
    problem: Problem | None = None
    pixels: Pixels | None = None

    @property
    def content_key(self) -> int:
        """A number that tells what arrived from other photos, in this process: of its length and of every STRIDE-th byte.

        Python's own hash, as hashlib lets others at the lock each time.
        """
        data = self.data if self.pixels is None else self.pixels.tobytes()
        return hash((len(data), data[::STRIDE]))


@dataclass(frozen=True)
class Uploads:
    """What a request brought: its photos, and the text ``fields`` of its form."""

    images: list[Upload]
    fields: dict[str, str] = field(default_factory=dict)


def read_uploads(request: Request, settings: Settings) -> Uploads:
    """Read the body, whole and in time, and take the photos out of it. Raises Problem where there is none to be had."""
    kind = request.mimetype
    if kind not in ("multipart/form-data", "application/json", "application/octet-stream") and not kind.startswith("image/"):
        raise Problem("unsupported_media_type", f"The body came as {kind or 'no media type'}; {ACCEPTED_FORMATS}.")
    body = read_body(request, settings)
    if kind == "multipart/form-data":
        sent = _from_form(request, body, settings)
    elif kind == "application/json":
        sent = Uploads(_from_json(body, settings))
    else:
        sent = Uploads([Upload(None, body)] if body else [])
    if not sent.images:
        raise Problem("no_image", f"No photo arrived; {ACCEPTED_FORMATS}.")
    check_image_count(len(sent.images), settings)
    return sent


def check_image_count(photos: int, settings: Settings) -> None:
    """Raise Problem for more photos than one request may bring."""
    if photos > settings.max_images:
        raise Problem(
            "too_many_images",
            f"{photos} photos arrived and {settings.max_images} is the most; send them in several requests.",
        )


def _from_form(request: Request, body: bytes, settings: Settings) -> Uploads:
    """Every file of the form, whatever its field is called; a browser sends a nameless empty one where none was chosen."""
    parts = parse_form(body, request.mimetype_params.get("boundary"), max_images=settings.max_images)
    uploads = [Upload(part.filename or None, part.data) for part in parts if part.filename is not None]
    uploads = [upload for upload in uploads if upload.name or upload.data]
    if not uploads and any(part.name == "file" and part.filename is None for part in parts):
        raise Problem("no_image", "The field `file` came without a file name, as text; with curl, write -F file=@photo.jpg.")
    fields = {part.name: part.data.decode(errors="replace") for part in parts if part.filename is None}
    return Uploads(uploads, fields)


def _from_json(body: bytes, settings: Settings) -> list[Upload]:
    document = parse_json(body, max_values=OTHER_VALUES + settings.max_images * VALUES_PER_PHOTO, hint=JSON_FORMAT)
    if not isinstance(document, dict):
        raise Problem("bad_json", f"The JSON is not an object; {JSON_FORMAT}.")
    if "image" in document:
        upload = upload_from_base64(document["image"])
        if upload.problem:
            raise upload.problem
        return [upload]
    instances = document.get("instances")
    if not isinstance(instances, list):
        raise Problem("bad_json", f"The JSON has neither `image` nor a list `instances`; {JSON_FORMAT}.")
    check_image_count(len(instances), settings)  # before each of a million empty ones gets a problem of its own
    return [upload_from_base64(row.get("b64") if isinstance(row, dict) else None) for row in instances]


JSON_FORMAT = 'send {"image": "<base64>"} or {"instances": [{"b64": "<base64>"}]}'


def upload_from_base64(text: Any) -> Upload:
    """The bytes behind base64, as it is or as a data: URL."""
    if not isinstance(text, str):
        return Upload(None, b"", Problem("bad_json", f"A photo in the JSON is no text; {JSON_FORMAT}."))
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return Upload(None, base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        return Upload(None, b"", Problem("bad_base64", f"The base64 cannot be read ({error}); encode the photo's bytes again."))


def is_client_connected(environ: dict[str, Any]) -> bool:
    """Return whether the client may still take a response; true where the server does not tell.

    Only a reset says that it will not: a client that has sent all it has to send may close its half of the connection.
    """
    connection: socket.socket | None = environ.get("gunicorn.socket")
    if connection is None:
        return True
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False
    return True
