"""Pictures for people, made of a photo's bytes: upright, in sRGB, no larger than wanted, and with nothing else in the file."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from PIL import Image, ImageCms

from models.runtime.openvino_engine import Pixels
from service.inference.image_decoder import ImageDecoder

MAX_PROFILE_BYTES = 1 << 20
DISPLAY_MAX_PX = 2048


@dataclass(frozen=True)
class RenderedImage:
    """A picture's file, and how large it is shown."""

    data: bytes
    width_px: int
    height_px: int
    media_type: str = "image/jpeg"


def render_jpeg(data: bytes, *, decoder: ImageDecoder, max_side_px: int = DISPLAY_MAX_PX, quality: int = 90) -> RenderedImage:
    """Make a JPEG of a photo, its longer side ``max_side_px`` at most. Raises Problem for what is no photo, or too large a one.

    Nothing of the photo's metadata goes along: no EXIF with its place, no comment, no preview. Transparent parts become white
    and colours of another profile sRGB, as a browser would show them; the model is given them as they are.
    """
    profiles: list[bytes] = []
    photo = decoder.decode(
        data, min_side_px=max_side_px, on_open=lambda opened: profiles.append(opened.info.get("icc_profile") or b"")
    )
    scale = min(1.0, max_side_px / max(photo.size))
    if scale < 1:
        size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        photo = photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
    photo = _to_srgb(photo, profiles[0])
    photo.info = {}  # Pillow writes a comment that it finds there
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return RenderedImage(file.getvalue(), *photo.size)


def encode_png(pixels: Pixels) -> bytes:
    """(H, W, C) uint8 -> a PNG file with exactly these pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


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
