"""Names of datasets, classes and photos: what may become a folder or a file on every operating system."""

from __future__ import annotations

import os
import re
import unicodedata

from models.artifacts.data_folder import EXTENSIONS, RESERVED_CLASSES, class_name, is_neither, split_of
from service.http.errors import Problem

MAX_CHARS = 60
MAX_FILE_BYTES = 200  # limit of a file name in UTF-8; file systems allow 255
DATASET_NAME = re.compile(r"[\w][\w -]*")
LEFT_OUT = "left-out"  # the folder of photos that were left out
RESERVED_NAMES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)  # reserved on Windows
FORBIDDEN = re.compile(r'[\\/:*?"<>|]')
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm"} | {
    "AVIF": ".avif",
    "HEIF": ".heic",
}


def check_dataset_name(text: str) -> str:
    """Return the name of a dataset in its normal form. It has no dot, so that its side folders can be named after it.

    Raises:
        Problem: The name is empty, too long, or has other characters than letters, digits, spaces, - and _.
    """
    name = unicodedata.normalize("NFC", text).strip()
    if (
        not DATASET_NAME.fullmatch(name)
        or len(name) > MAX_CHARS
        or _bytes(name) > MAX_FILE_BYTES
        or RESERVED_NAMES.fullmatch(name)
    ):
        raise Problem(
            "bad_parameter",
            f"A dataset cannot be named {text[:MAX_CHARS]!r}. Use 1 to {MAX_CHARS} letters, digits, spaces, - and _, and start"
            " with a letter or digit.",
        )
    return name


def check_class_name(text: str) -> str:
    """Return the name of a class in its normal form.

    Raises:
        Problem: No folder can have this name, or ``finetune`` would not read that folder as a class.
    """
    name = class_name(text).strip()
    problem = ""
    if not name or len(name) > MAX_CHARS or _bytes(name) > MAX_FILE_BYTES:
        problem = f"it must have 1 to {MAX_CHARS} characters"
    elif not name.isprintable() or FORBIDDEN.search(name) or name.startswith((".", "__")) or name.endswith("."):
        problem = "it has characters that a folder cannot have"
    elif RESERVED_NAMES.fullmatch(name) or name.casefold() in (*RESERVED_CLASSES, LEFT_OUT):
        problem = "this name is reserved"
    elif split_of(name):
        problem = "folders with this name are splits, not classes"
    if problem:
        raise Problem("bad_parameter", f"A class cannot be named {text[:MAX_CHARS]!r}: {problem}. Choose another name.")
    return name


def is_class(name: str) -> bool:
    """Return whether a class folder is one of the model's classes, and not that of photos of none of them."""
    return not is_neither(name)


def clean_file_name(text: str, image_format: str | None = None) -> str:
    """Return a name for a photo's file that every file system takes, as similar to the client's as possible.

    Args:
        text: The client's name, also with folders, which become a part of the name.
        image_format: Pillow's name of the file's format. It decides about the suffix if the name has none of an image.
    """
    parts = [part for part in re.split(r"[\\/]", unicodedata.normalize("NFC", text)) if part not in ("", ".", "..")]
    name = "_".join(parts)
    name = "".join(char if char.isprintable() and not FORBIDDEN.match(char) else "_" for char in name).strip(" .") or "photo"
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in EXTENSIONS:
        stem, suffix = name, SUFFIXES.get(image_format or "", ".jpg")
    stem = stem.lstrip(".") or "photo"
    if RESERVED_NAMES.fullmatch(stem):
        stem = f"_{stem}"
    while _bytes(stem + suffix) > MAX_FILE_BYTES:
        stem = stem[:-1]
    return stem + suffix


def _bytes(text: str) -> int:
    return len(text.encode())
