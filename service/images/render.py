"""Encode pixels as PNG."""

from __future__ import annotations

import base64
import io

from PIL import Image

from models.runtime.openvino_engine import Pixels


def encode_png(pixels: Pixels) -> bytes:
    """Encode (H, W, C) uint8 pixels, C = 1 or 3, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def png_data_url(pixels: Pixels) -> str:
    """Encode (H, W, C) uint8 pixels as a data URL."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()
