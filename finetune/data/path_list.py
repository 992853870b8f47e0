"""Read lists of paths: one per line, or separated by NUL characters, in UTF-8 or UTF-16. Does not import torch."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 16


def read_path_list(stream: io.BufferedIOBase) -> Iterator[Path]:
    """Yield the paths of a list as they arrive.

    Supports what ``find``, ``find -print0``, editors and PowerShell (UTF-16) write. Empty entries are skipped.
    """
    head = b""
    while not re.search(rb"...[\n\0]", head, re.DOTALL) and (chunk := stream.read1(CHUNK_BYTES)):
        head += chunk
    if encoding := _utf16(head):
        decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
        chunks: Iterator[bytes] = (os.fsencode(decoder.decode(chunk).lstrip("\ufeff")) for chunk in _chunks(head, stream))
        separator = b"\n"
    else:
        head = head.removeprefix(codecs.BOM_UTF8)
        separator = b"\0" if b"\0" in head else b"\n"
        chunks = _chunks(head, stream)
    rest = b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(separator)
        yield from (Path(os.fsdecode(name)) for entry in complete if (name := _strip(entry, separator)))
    if name := _strip(rest, separator):
        yield Path(os.fsdecode(name))


def _utf16(head: bytes) -> str | None:
    """Return the encoding of UTF-16 text, with a byte order mark or without."""
    if head.startswith(codecs.BOM_UTF16_LE) or (head[1:2] == b"\0" and head[3:4] == b"\0"):
        return "utf-16-le"
    if head.startswith(codecs.BOM_UTF16_BE) or (head[:1] == b"\0" and head[2:3] == b"\0"):
        return "utf-16-be"
    return None


def _chunks(head: bytes, stream: io.BufferedIOBase) -> Iterator[bytes]:
    while head:
        yield head
        head = stream.read1(CHUNK_BYTES)


def _strip(entry: bytes, separator: bytes) -> bytes:
    return entry.rstrip(b"\r\n") if separator == b"\n" else entry.strip(b"\r\n")
