"""Text that every database can store, and the encoding of file names as such text."""

from __future__ import annotations

import re

# PostgreSQL stores no NUL, and half of a surrogate pair cannot be encoded as UTF-8.
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_TO_PRIVATE = {0: 0xF700} | {0xDC00 + byte: 0xF700 + byte for byte in range(128, 256)}
_FROM_PRIVATE = {private: escaped for escaped, private in _TO_PRIVATE.items()}


def is_storable(*texts: str) -> bool:
    """Return whether every database, file name and HTTP response takes these texts."""
    return not any(UNSTORABLE.search(text) for text in texts)


def encode_file_name(name: str) -> str:
    """Replace bytes that are not UTF-8, which Python decodes to surrogates, by characters of a private use area."""
    return name.translate(_TO_PRIVATE)


def decode_file_name(name: str) -> str:
    """Restore a file name as the file system and predictions.csv have it."""
    return name.translate(_FROM_PRIVATE)
