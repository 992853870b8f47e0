"""The photos of a request, in whichever form they came: multipart, a raw body, or base64 in JSON."""

from __future__ import annotations

import base64
import binascii
import io
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import parse_form_data

from service.problems import Problem
from service.settings import Settings

PIECE = 1 << 16
FORMS = "send multipart/form-data with the field `file`, a photo as the body (image/*), or JSON"


@dataclass(frozen=True)
class Upload:
    """A photo's bytes as they arrived, or the reason why there are none; ``name`` is the sender's, or None."""

    name: str | None
    data: bytes
    problem: Problem | None = None


def read_uploads(request: Request, settings: Settings) -> list[Upload]:
    """Read the body, whole and in time, and take the photos out of it. Raises Problem where there is none to be had."""
    kind = request.mimetype
    if kind not in ("multipart/form-data", "application/json", "application/octet-stream") and not kind.startswith("image/"):
        raise Problem("unsupported_media_type", f"The body came as {kind or 'no media type'}; {FORMS}.")
    body = read_body(request, settings)
    if kind == "multipart/form-data":
        uploads = _from_form(request, body, settings)
    elif kind == "application/json":
        uploads = _from_json(body)
    else:
        uploads = [Upload(None, body)] if body else []
    if not uploads:
        raise Problem("no_photo", f"No photo arrived; {FORMS}.")
    if len(uploads) > settings.max_photos:
        raise Problem(
            "too_many_photos",
            f"{len(uploads)} photos arrived and {settings.max_photos} is the most; send them in several requests.",
        )
    return uploads


def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body, at most ``max_body_mb`` of it and within ``body_timeout_s``. Raises Problem."""
    limit, length = settings.max_body_bytes, request.content_length
    if length is not None and length > limit:
        raise _too_large(f"{length:,}", settings)
    source, until = request.environ["wsgi.input"], time.monotonic() + settings.body_timeout_s
    connection: socket.socket | None = request.environ.get("gunicorn.socket")
    if length is None and not request.environ.get("wsgi.input_terminated"):
        return b""  # without a length such a server would wait for ever
    pieces, size = [], 0
    try:
        while length is None or size < length:
            if connection:
                connection.settimeout(max(0.001, until - time.monotonic()))
            piece = source.read(PIECE if length is None else min(PIECE, length - size))
            if not piece:
                break
            size += len(piece)
            if size > limit:
                raise _too_large(f"More than {limit:,}", settings)
            pieces.append(piece)
    except Problem:
        raise
    except TimeoutError:
        raise Problem(
            "body_timeout",
            f"{size:,} bytes of the body arrived in {settings.body_timeout_s:g} s, and not the rest; send it again.",
            headers={"Connection": "close"},
        ) from None
    except Exception as error:  # the server's parser raises what it likes on a body that breaks off or is malformed
        raise Problem("bad_request", f"The body could not be read ({error!r}); send it again.") from None
    finally:
        if connection:
            connection.settimeout(None)
    if length is not None and size < length:
        raise Problem("bad_request", f"{length:,} bytes were announced and {size:,} arrived; send it again.")
    return b"".join(pieces)


def _too_large(arrived: str, settings: Settings) -> Problem:
    return Problem(
        "body_too_large", f"{arrived} bytes arrived and {settings.max_body_bytes:,} is the most; send fewer or smaller photos."
    )


def _from_form(request: Request, body: bytes, settings: Settings) -> list[Upload]:
    environ = request.environ | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
    try:
        _, fields, files = parse_form_data(
            environ,
            stream_factory=lambda *_, **__: io.BytesIO(),  # not a file: the body is in memory already, and bounded
            max_form_memory_size=settings.max_body_bytes,
            max_form_parts=settings.max_photos * 4 + 16,
            silent=False,
        )
    except RequestEntityTooLarge:
        raise Problem("too_many_photos", f"The form has too many parts; {settings.max_photos} photos are the most.") from None
    except ValueError as error:
        raise Problem("bad_form", f"The form cannot be read ({error}); {FORMS}.") from None
    uploads = [
        Upload(part.filename or None, part.stream.read())
        for _, part in files.items(multi=True)
        if part.filename or _has_bytes(part.stream)
    ]
    if not uploads and "file" in fields:
        raise Problem("no_photo", "The field `file` came without a file name, as text; with curl, write -F file=@photo.jpg.")
    return uploads


def _has_bytes(stream: Any) -> bool:
    """A browser sends an empty part without a name where no file was chosen."""
    first = stream.read(1)
    stream.seek(0)
    return bool(first)


def _from_json(body: bytes) -> list[Upload]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem("bad_json", f"The JSON cannot be read ({error}); {JSON_FORM}.") from None
    if not isinstance(document, dict):
        raise Problem("bad_json", f"The JSON is not an object; {JSON_FORM}.")
    if "image" in document:
        upload = _from_base64(document["image"])
        if upload.problem:
            raise upload.problem
        return [upload]
    instances = document.get("instances")
    if not isinstance(instances, list):
        raise Problem("bad_json", f"The JSON has neither `image` nor a list `instances`; {JSON_FORM}.")
    return [_from_base64(row.get("b64") if isinstance(row, dict) else None) for row in instances]


JSON_FORM = 'send {"image": "<base64>"} or {"instances": [{"b64": "<base64>"}]}'


def _from_base64(text: Any) -> Upload:
    """The bytes behind base64, as it is or as a data: URL."""
    if not isinstance(text, str):
        return Upload(None, b"", Problem("bad_json", f"A photo in the JSON is no text; {JSON_FORM}."))
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return Upload(None, base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        return Upload(None, b"", Problem("bad_base64", f"The base64 cannot be read ({error}); encode the photo's bytes again."))


def client_is_there(environ: dict[str, Any]) -> bool:
    """Whether the one who asked still holds the connection open. Where the server does not tell, yes."""
    connection: socket.socket | None = environ.get("gunicorn.socket")
    if connection is None:
        return True
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except (BlockingIOError, InterruptedError):
        return True
    except ValueError:  # TLS has no such look
        return True
    except OSError:
        return False
