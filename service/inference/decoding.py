"""Decode an image into what the model takes, or into a picture for people.

Pillow, NumPy and ``models.preprocess`` only: a decoder process imports this module and little else.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageCms

from models.image_structure import too_large
from models.preprocess import Preprocessing, decode
from models.runtime.openvino_engine import Pixels

MAX_PROFILE_BYTES = 1 << 20
ANIMATED = {"GIF", "PNG", "WEBP", "TIFF"}  # a phone's JPEG may hold a second picture, but not an animation


@dataclass(frozen=True)
class PreprocessedImage:
    """What the model sees of a photo: ``pixels`` (H, W, C) uint8; the size is the one that arrived."""

    pixels: Pixels
    width_px: int
    height_px: int
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RenderedImage:
    """A picture's file, and how large it is shown."""

    data: bytes
    width_px: int
    height_px: int
    media_type: str = "image/jpeg"


def preprocess(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> PreprocessedImage:
    """Decode and crop a photo whose structure was examined. Raises ImageError."""
    opened: dict[str, Any] = {}

    def inspect(photo: Image.Image) -> None:
        _check_size(photo, max_pixels)
        opened.update(width_px=photo.width, height_px=photo.height, format=photo.format or "", notes=_notes(photo))

    pixels = preprocessing.pixels(data, inspect=inspect, limits=None)
    return PreprocessedImage(pixels, **opened)


def render(data: bytes, *, max_side_px: int, quality: int, max_pixels: int) -> RenderedImage:
    """Make a JPEG of a photo whose structure was examined, its longer side ``max_side_px`` at most. Raises ImageError.

    Nothing of the photo's metadata goes along: no EXIF with its place, no comment, no preview. Transparent parts become white
    and colours of another profile sRGB, as a browser would show them; the model is given them as they are.
    """
    profile = b""

    def inspect(opened: Image.Image) -> None:
        nonlocal profile
        _check_size(opened, max_pixels)
        profile = opened.info.get("icc_profile") or b""

    photo = decode(data, min_side_px=max_side_px, inspect=inspect, limits=None)
    scale = min(1.0, max_side_px / max(photo.size))
    if scale < 1:
        size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        photo = photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
    photo = _to_srgb(photo, profile)
    photo.info = {}  # Pillow writes a comment that it finds there
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return RenderedImage(file.getvalue(), *photo.size)


def _check_size(photo: Image.Image, max_pixels: int) -> None:
    if photo.width * photo.height > max_pixels:
        raise too_large(photo.width, photo.height, max_pixels)


def _notes(photo: Image.Image) -> tuple[str, ...]:
    if photo.format in ANIMATED and getattr(photo, "is_animated", False):
        return ("It has several frames; the first was classified.",)
    return ()


def _to_srgb(photo: Image.Image, profile: bytes) -> Image.Image:
    """Of RGB by its own profile -> sRGB; where the profile cannot be read, or is not of RGB, the colours stay."""
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return photo
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space.strip() == "RGB":
            converted = ImageCms.profileToProfile(photo, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or photo
    return photo


# What a decoder process does, by name. Arguments and results are plain values, so that they can cross as JSON and bytes:
# the process that asks must not unpickle what comes from one that has read a stranger's file.


def preprocess_plain(data: bytes, *, preprocessing: dict[str, Any], max_pixels: int) -> tuple[dict[str, Any], bytes]:
    made = preprocess(data, Preprocessing(**preprocessing), max_pixels=max_pixels)
    fields = {"width_px": made.width_px, "height_px": made.height_px, "format": made.format, "notes": made.notes}
    return fields | {"shape": made.pixels.shape}, made.pixels.tobytes()


def render_plain(data: bytes, *, max_side_px: int, quality: int, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    made = render(data, max_side_px=max_side_px, quality=quality, max_pixels=max_pixels)
    return {"width_px": made.width_px, "height_px": made.height_px, "media_type": made.media_type}, made.data


PLAIN_JOBS: dict[str, Callable[..., tuple[dict[str, Any], bytes]]] = {"preprocess": preprocess_plain, "render": render_plain}
