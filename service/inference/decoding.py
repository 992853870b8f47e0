"""Decode an image to the pixels that a network takes, or to a JPEG for people.

This module imports Pillow, NumPy and ``models.preprocess`` only, as the decoder process imports little else.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageCms

from models.heif_structure import has_sequence
from models.image_structure import too_large
from models.preprocess import Preprocessing, decode
from models.runtime.openvino_engine import Pixels

MAX_PROFILE_BYTES = 1 << 20
ANIMATED = {"GIF", "PNG", "WEBP", "TIFF"}  # a JPEG of a phone may contain a second image, but no animation
CONTAINERS = {"AVIF", "HEIF"}


@dataclass(frozen=True)
class PreprocessedImage:
    """An image as the network takes it: ``pixels`` (H, W, C) uint8. Size and format are those of the file."""

    pixels: Pixels
    width_px: int
    height_px: int
    format: str
    notes: tuple[str, ...] = ()


def preprocess(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> PreprocessedImage:
    """Decode, resize and crop an image whose structure was examined. Raises ImageError."""
    opened: dict[str, Any] = {}

    def inspect(image: Image.Image) -> None:
        _check_size(image, max_pixels)
        opened.update(width_px=image.width, height_px=image.height, format=image.format or "", notes=_notes(image, data))

    pixels = preprocessing.pixels(data, inspect=inspect, limits=None)
    return PreprocessedImage(pixels, **opened)


def render(data: bytes, *, max_side_px: int, quality: int, max_pixels: int) -> bytes:
    """Render an image whose structure was examined as a JPEG without metadata.

    Transparent areas become white, and colors of another profile sRGB, as in a browser. The network takes them unconverted.

    Args:
        data: The image file.
        max_side_px: Upper limit of the longer side.
        quality: JPEG quality.
        max_pixels: Largest image.

    Raises:
        ImageError: The image is too large or damaged.
    """
    profile = b""

    def inspect(opened: Image.Image) -> None:
        nonlocal profile
        _check_size(opened, max_pixels)
        profile = opened.info.get("icc_profile") or b""

    image = decode(data, min_side_px=max_side_px, inspect=inspect, limits=None)
    scale = min(1.0, max_side_px / max(image.size))
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
    image = _to_srgb(image, profile)
    image.info = {}  # Pillow would write a comment from there
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise too_large(image.width, image.height, max_pixels)


def _notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    if image.format in CONTAINERS:
        if image.format == "HEIF" and getattr(image, "is_animated", False):
            return ("The file contains several images. The primary one was classified.",)
        return ("The image has several frames. The primary image was classified.",) if has_sequence(data) else ()
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        return ("The image has several frames. The first one was classified.",)
    return ()


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert RGB with a profile to sRGB. Colors stay as they are if the profile is unreadable or not RGB."""
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return image
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB":
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or image
    return image


# The jobs of the decoder process. Arguments and results are JSON and bytes: the service must not unpickle data from a process
# that has read an untrusted file.


def preprocess_plain(data: bytes, *, preprocessing: dict[str, Any], max_pixels: int) -> tuple[dict[str, Any], bytes]:
    result = preprocess(data, Preprocessing(**preprocessing), max_pixels=max_pixels)
    fields = {"width_px": result.width_px, "height_px": result.height_px, "format": result.format, "notes": result.notes}
    return fields | {"shape": result.pixels.shape}, result.pixels.tobytes()


def render_plain(data: bytes, **arguments: int) -> tuple[dict[str, Any], bytes]:
    return {}, render(data, **arguments)


PLAIN_JOBS: dict[str, Callable[..., tuple[dict[str, Any], bytes]]] = {"preprocess": preprocess_plain, "render": render_plain}
