"""Compress text responses, and answer with 304 if the browser has the current version of a page.

No response mixes a secret with text of another site's choice, so that compression leaks nothing by its length (BREACH).
"""

from __future__ import annotations

import gzip

from flask import Request, Response

MIN_COMPRESSED_BYTES = 1_400  # less fits into one packet anyway
GZIP_LEVEL = 5
TEXT_TYPES = frozenset({"application/json", "application/javascript", "image/svg+xml"})


def compress(request: Request, response: Response) -> None:
    """Add an ETag to a page that browsers revalidate, and compress text if the client accepts gzip.

    Images, archives and streamed responses stay as they are, and so do responses to POST, where the time of a prediction
    matters more than its few bytes.
    """
    media_type = response.mimetype or ""
    is_text = media_type.startswith("text/") or media_type in TEXT_TYPES
    is_file = response.direct_passthrough  # a static file
    if (
        request.method not in ("GET", "HEAD")
        or response.status_code != 200
        or not is_text
        or "Content-Encoding" in response.headers
    ):
        return
    if response.is_streamed and not is_file:
        return
    response.vary.add("Accept-Encoding")
    if response.cache_control.no_cache and not is_file:
        response.add_etag(weak=True)
        response.make_conditional(request)
        if response.status_code == 304:
            return
    length = response.content_length or 0
    if length < MIN_COMPRESSED_BYTES or not request.accept_encodings["gzip"]:
        return
    response.direct_passthrough = False
    response.set_data(gzip.compress(response.get_data(), GZIP_LEVEL, mtime=0))
    response.headers["Content-Encoding"] = "gzip"
    etag, _ = response.get_etag()
    if etag:
        response.set_etag(etag, weak=True)  # the same content in another encoding
