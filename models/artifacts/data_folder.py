"""The conventions of a data folder: which names are splits or classes, and which files are images or tables of labels."""

from __future__ import annotations

import os
import re
import unicodedata

EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".avif", ".heic", ".heif", ".hif", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm",
)  # fmt: skip
TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".jsonl")  # of a table of labels
TRAIN, VALID, TEST = "train", "valid", "test"
NEITHER_FOLDERS = ("none", "neither")  # next to the class folders: photos of none of the classes
RESERVED_CLASSES = ("unlabeled",)  # the gallery's name for photos without a label
UNSTORABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # surrogates stand for bytes that are not UTF-8
_FILLER = r"(?:data|set|images?|imgs?|photos?|pictures?|pics?|split|folder|files?|samples?|examples?)*"
_SPLIT = re.compile(
    rf"\d*{_FILLER}(?:(?P<train>train(?:ing|s)?|trn)|(?P<valid>val(?:id(?:ation|ate|ating|s)?|s)?|dev(?:elopment)?|"
    rf"eval(?:uation|uate|s)?|h(?:o|e)ldout)|(?P<test>test(?:ing|s)?|tst)){_FILLER}\d*"
)


def split_of(name: str) -> str | None:
    """Return the split ("train", "valid", "test") that a folder name stands for, as in "Training_Set" or "val2017"."""
    compact = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
    match = _SPLIT.fullmatch(compact)
    return match.lastgroup if match else None


def class_name(text: str) -> str:
    """Return the class that a folder name or a label stands for: in Unicode form NFC, and without spaces around it."""
    return unicodedata.normalize("NFC", text).strip()


def is_neither(text: str) -> bool:
    """Return whether a folder next to the class folders, or a label, stands for photos of none of the classes."""
    return class_name(text).casefold() in NEITHER_FOLDERS


def is_reserved(text: str) -> bool:
    """Return whether no class may have this name."""
    return class_name(text).casefold() in RESERVED_CLASSES


def is_image_name(name: str) -> bool:
    """Return whether a file has the name of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def is_table_name(name: str) -> bool:
    """Return whether a file has the name of a table of labels."""
    return os.path.splitext(name)[1].lower() in TABLE_EXTENSIONS
