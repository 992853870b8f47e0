"""Exceptions for errors that the user can fix, all derived from ``UserError``.

Each message states what was wrong, what was expected and what to do. The CLI prints it and exits with code 2; the service
returns it as a 4xx response. Any other exception is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MIN_PREFIX = 4


class UserError(Exception):
    """Base class of the errors that the user can fix; the message explains how."""


class UnknownModelError(UserError):
    """No network is registered under this name."""


class WeightsError(UserError):
    """Weights are missing, damaged or belong to another network."""


class BundleError(UserError):
    """A bundle is missing, modified, incomplete or in a newer format."""


class ImageError(UserError):
    """An image cannot be decoded."""


class UnsupportedImageError(ImageError):
    """The data is not an image, or its format is not supported."""


class ImageTooLargeError(ImageError):
    """An image has too many pixels to be decoded safely."""


class TooComplexError(ImageError):
    """An image takes too long or too much memory to decode. ``reason`` names the bound, for a metric's label."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class DataError(UserError):
    """A dataset is malformed or unsuitable for training."""


class ConfigError(UserError):
    """A setting is unknown or has an invalid value."""


class RunError(UserError):
    """A run directory already exists, or cannot be resumed."""


def list_names(names: Iterable[str], limit: int = 10) -> str:
    """List names for a message: all of them, or the first ``limit`` and how many there are."""
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])}, ... ({len(names):,} in total)"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known name.

    Args:
        name: The unknown name.
        known: The valid names.

    Returns:
        ``" Did you mean 'x'?"``, or an empty string if no name is close. The shortest name that begins with ``name`` takes
        precedence, then one with the same letters in another order.
    """
    known = list(known)
    longer = [word for word in known if len(name) >= MIN_PREFIX and word.startswith(name)]
    if longer:
        return f" Did you mean {min(longer, key=lambda word: (len(word), word))!r}?"
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    nearest = next((word for word in near if sorted(word) == sorted(name)), near[0] if near else None)
    return f" Did you mean {nearest!r}?" if nearest else ""
