"""The mistakes that a person can mend, in one tree.

Each text is one sentence: what arrived, what was wanted and what to type next. A command line prints it and exits with 2;
a server answers it with a 4xx. Anything that is not a ``UserError`` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that a person can mend; the text says how."""


class UnknownModelError(UserError):
    """No network is registered under that name."""


class WeightsError(UserError):
    """Weights are missing, damaged or made for another network."""


class BundleError(UserError):
    """A bundle is missing, changed, incomplete or too new."""


class ImageError(UserError):
    """A file is not a photo that can be decoded."""


class UnsupportedImageError(ImageError):
    """Bytes are not a picture, or of a format that is not taken."""


class ImageTooLargeError(ImageError):
    """A picture is larger than can be decoded safely."""


class TooComplexError(ImageError):
    """An image takes too long or too much memory to decode. ``reason`` names the bound, for a metric's label."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class DataError(UserError):
    """A dataset folder is not what training needs."""


class ConfigError(UserError):
    """A setting is unknown or has a value that it cannot take."""


class RunError(UserError):
    """A run's folder is in the way, or not what resuming needs."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the nearest known word as ``" Did you mean 'x'?"``, or nothing where none is near; swapped letters come first."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    nearest = next((word for word in near if sorted(word) == sorted(name)), near[0] if near else None)
    return f" Did you mean {nearest!r}?" if nearest else ""
