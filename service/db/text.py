"""Text that every database can store, the encoding of file names as such text, and names in different Unicode forms."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

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


def match_name(names: Iterable[str], text: str) -> str | None:
    """Return the name that equals ``text``, or equals it in another Unicode form, or None."""
    names, normalized = tuple(names), unicodedata.normalize("NFC", text)
    return text if text in names else next((name for name in names if unicodedata.normalize("NFC", name) == normalized), None)


def unicode_forms(text: str) -> set[str]:
    """Return the forms in which file systems and keyboards write the same text."""
    return {text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)}


def decode_file_name(name: str) -> str:
    """Restore a file name as the file system and predictions.csv have it."""
    return name.translate(_FROM_PRIVATE)
