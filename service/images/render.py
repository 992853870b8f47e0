"""Pictures for people, made of a photo's bytes: upright, in sRGB, no larger than wanted, and with nothing else in the file."""

from __future__ import annotations

import io

from PIL import Image

from models.runtime.openvino_engine import Pixels
from service.inference.decoding import RenderedImage
from service.inference.image_decoder import ImageDecoder

DISPLAY_MAX_PX = 2048


def render_jpeg(data: bytes, *, decoder: ImageDecoder, max_side_px: int = DISPLAY_MAX_PX, quality: int = 90) -> RenderedImage:
    """Make a JPEG of an image (``service.inference.decoding.render``). Raises Problem if it is invalid or too large."""
    return decoder.render(data, max_side_px=max_side_px, quality=quality)


def encode_png(pixels: Pixels) -> bytes:
    """(H, W, C) uint8 -> a PNG file with exactly these pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
