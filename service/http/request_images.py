"""The images of a request: from a multipart form, a raw body, or base64 in JSON."""

from __future__ import annotations

import base64
import binascii
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flask import Request
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser
from werkzeug.http import parse_options_header

from models.runtime.openvino_engine import Pixels
from service.http.errors import Problem
from service.http.request_body import OTHER_VALUES, parse_json, read_body
from service.settings import Settings

EXTRA_PARTS = 32  # parts of a form besides its images
VALUES_PER_IMAGE = 16  # JSON values of an item of `instances`: other clients describe an image besides its bytes
STRIDE = 61  # a prime, so that consecutive rows of uncompressed pixels are sampled at different columns
ACCEPTED_BODIES = "Send multipart/form-data with the field `file`, an image as the body (image/*), or JSON."
FORM_HINT = "Let an HTTP library build the form, or use curl -F file=@photo.jpg."
JSON_HINT = 'Send {"image": "<base64>"} or {"instances": [{"b64": "<base64>"}]}.'
BASE64_ALPHABET = str.maketrans("-_", "+/")  # of the URL-safe variant to the standard one


@dataclass(frozen=True)
class Upload:
    """An image as received.

    Attributes:
        name: The client's file name, if any.
        data: The bytes of the file.
        problem: Why there are no bytes, if so.
        pixels: (H, W, C) uint8, if the client preprocessed the image itself.
    """

    name: str | None
    data: bytes
    problem: Problem | None = None
    pixels: Pixels | None = None

    @property
    def content_key(self) -> int:
        """Hash the length and every STRIDE-th byte, to tell images apart within this process.

        Python's own hash keeps the interpreter's lock; hashlib releases it and then waits for it.
        """
        data = self.data if self.pixels is None else self.pixels.tobytes()
        return hash((len(data), data[::STRIDE]))


@dataclass(frozen=True)
class Uploads:
    """The images of a request, and the text ``fields`` of its form."""

    images: list[Upload]
    fields: dict[str, str] = field(default_factory=dict)


def read_uploads(request: Request, settings: Settings) -> Uploads:
    """Read the body and extract its images.

    Raises:
        Problem: The body cannot be read, contains no image or too many.
    """
    kind = request.mimetype
    if kind not in ("multipart/form-data", "application/json", "application/octet-stream") and not kind.startswith("image/"):
        raise Problem("unsupported_media_type", f"Unsupported Content-Type: {kind[:80] or 'none'}. {ACCEPTED_BODIES}")
    body = read_body(request, settings)
    if kind == "multipart/form-data":
        uploads = _from_form(body, request.mimetype_params.get("boundary"), settings)
    elif kind == "application/json":
        uploads = Uploads(_from_json(body, settings))
    else:
        uploads = Uploads([Upload(None, body)] if body else [])
    if not uploads.images:
        raise Problem("no_image", f"The request contains no image. {ACCEPTED_BODIES}")
    check_image_count(len(uploads.images), settings)
    return uploads


def check_image_count(count: int, settings: Settings) -> None:
    """Raise Problem for more images than one request may contain."""
    if count > settings.max_images:
        raise _too_many(f"{count:,} images", settings)


def _too_many(what: str, settings: Settings) -> Problem:
    return Problem("too_many_images", f"Too many images: {what}, the limit is {settings.max_images}. Send several requests.")


# Multipart forms


def _from_form(body: bytes, boundary: str | None, settings: Settings) -> Uploads:
    """Take every file of a form, whatever its field is called. A browser sends a nameless empty one if none was selected."""
    if not boundary:
        raise _bad_form("The Content-Type has no boundary")
    images, fields = [], {}
    max_parts = settings.max_images + EXTRA_PARTS
    # Not Werkzeug's parser, whose search for the boundary with a regular expression takes a millisecond for a photo. Latin-1
    # decodes every byte, so that a name in an unknown encoding is no error.
    parser = PushMultipartParser(boundary, len(body), max_segment_count=max_parts, header_charset="latin-1")
    try:
        for segment, data in _parts(parser, body):
            if _is_file(segment):
                images.append(Upload(_file_name(segment) or None, data))
            else:
                fields[_utf8(segment.name or "")] = data.decode(errors="replace")
    except ParserLimitReached as error:
        if "segment count" not in str(error):  # the headers of a part have limits too
            raise _bad_form(f"Invalid multipart form ({error})") from None
        raise _too_many(f"more than {max_parts} parts", settings) from None
    except (MultipartError, ValueError) as error:
        raise _bad_form(f"Invalid multipart form ({error})") from None
    images = [upload for upload in images if upload.name or upload.data]
    if not images and "file" in fields:
        raise Problem("no_image", f"The field `file` is text, not a file: it has no file name. {FORM_HINT}")
    return Uploads(images, fields)


def _bad_form(reason: str) -> Problem:
    return Problem("bad_form", f"{reason}. {FORM_HINT}")


def _parts(parser: PushMultipartParser, body: bytes) -> Iterator[tuple[MultipartSegment, bytes]]:
    segment: MultipartSegment | None = None
    chunks: list[bytes] = []
    with parser:
        for event in [*parser.parse(body), *parser.parse(b"")]:
            if isinstance(event, MultipartSegment):
                segment, chunks = event, []
            elif event:
                chunks.append(bytes(event))
            elif segment is not None:
                yield segment, b"".join(chunks)
                segment = None


def _is_file(segment: MultipartSegment) -> bool:
    """Return whether a form part is a file. A part without a file name is one if its type is an image type."""
    return _file_name(segment) is not None or (segment.content_type or "").startswith("image/")


def _file_name(segment: MultipartSegment) -> str | None:
    """Return the file name, "" for an empty one, or None for no file name at all."""
    disposition = segment.header("Content-Disposition", "")
    if "filename*" in disposition.lower():  # RFC 5987, which the form parser does not know
        return parse_options_header(disposition)[1].get("filename")
    return segment.filename and _utf8(segment.filename)


def _utf8(text: str) -> str:
    return text.encode("latin-1", "replace").decode(errors="replace")


# JSON


def _from_json(body: bytes, settings: Settings) -> list[Upload]:
    document = parse_json(body, max_values=OTHER_VALUES + settings.max_images * VALUES_PER_IMAGE, hint=JSON_HINT)
    if not isinstance(document, dict):
        raise Problem("bad_json", f"The JSON is not an object. {JSON_HINT}")
    if "image" in document and "instances" in document:
        raise Problem("bad_json", f"The JSON has both `image` and `instances`. {JSON_HINT}")
    if "image" in document:
        upload = _from_item(document["image"])
        if upload.problem:
            raise upload.problem
        return [upload]
    instances = document.get("instances")
    if not isinstance(instances, list):
        raise Problem("bad_json", f"The JSON has neither `image` nor a list `instances`. {JSON_HINT}")
    check_image_count(len(instances), settings)
    return [_from_item(item) for item in instances]


def _from_item(item: Any) -> Upload:
    """Decode base64, an object with it as ``b64``, or one with a single such object, as TensorFlow Serving's clients send."""
    if isinstance(item, dict) and "b64" not in item:
        nested = [value for value in item.values() if isinstance(value, dict) and "b64" in value]
        item = nested[0] if len(nested) == 1 else None
    return upload_from_base64(item["b64"] if isinstance(item, dict) else item)


def upload_from_base64(text: Any) -> Upload:
    """Decode base64 in the standard or the URL-safe alphabet, also as a data: URL."""
    if not isinstance(text, str):
        return Upload(None, b"", Problem("bad_json", f"An image in the JSON is not a base64 string. {JSON_HINT}"))
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    text = "".join(line.strip() for line in text.splitlines()).translate(BASE64_ALPHABET)
    if " " in text:  # forms decode + to a space, so that removing it would change the data
        return Upload(
            None, b"", Problem("bad_base64", "Invalid base64 (it contains spaces). Encode the bytes of the file again.")
        )
    text += "=" * (-len(text) % 4)  # URL-safe base64 is usually sent without padding
    try:
        return Upload(None, base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        return Upload(None, b"", Problem("bad_base64", f"Invalid base64 ({error}). Encode the bytes of the file again."))


def is_client_connected(environ: dict[str, Any]) -> bool:
    """Return whether the client may still read a response; True if the server does not offer its socket.

    Only a reset proves that it will not: a client that has sent everything may close its half of the connection.
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
