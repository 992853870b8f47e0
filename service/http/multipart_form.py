"""The parts of a multipart form, from a body that is in memory already."""

from __future__ import annotations

from dataclasses import dataclass

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser

from service.http.errors import Problem

EXTRA_PARTS = 32  # what a form may have beside photos
FORM = "write the form as curl -F file=@photo.jpg does"


@dataclass(frozen=True)
class Part:
    """One part of a form; ``filename`` is None for a field of text."""

    name: str
    filename: str | None
    data: bytes


def parse_form(body: bytes, boundary: str | None, *, max_images: int) -> list[Part]:
    """The parts of ``body``, in their order. Raises Problem for what is no form, or has too many parts.

    Not with Werkzeug's parser, which looks for the boundary with a regular expression: a millisecond for a photo.
    """
    if not boundary:
        raise Problem("bad_form", f"The form's Content-Type names no boundary; {FORM}.")
    try:
        return _parts(PushMultipartParser(boundary, len(body), max_segment_count=max_images + EXTRA_PARTS), body)
    except ParserLimitReached as error:
        if "segment count" not in str(error):  # a part's headers have limits too
            raise Problem("bad_form", f"The form cannot be read ({error}); {FORM}.") from None
        raise Problem(
            "too_many_images", f"The form has too many parts; {max_images} photos are the most, send them in several requests."
        ) from None
    except (MultipartError, ValueError) as error:
        raise Problem("bad_form", f"The form cannot be read ({error}); {FORM}.") from None


def _parts(parser: PushMultipartParser, body: bytes) -> list[Part]:
    parts: list[Part] = []
    segment: MultipartSegment | None = None
    pieces: list[bytes] = []
    with parser:
        for event in [*parser.parse(body), *parser.parse(b"")]:
            if isinstance(event, MultipartSegment):
                segment, pieces = event, []
            elif event:
                pieces.append(bytes(event))
            elif segment is not None:
                parts.append(Part(segment.name or "", segment.filename, b"".join(pieces)))
                segment = None
    return parts
