"""Decode images as torchvision's Resize and CenterCrop do. Without torch, so that a process that only decodes stays small."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(os.environ["NETWORK"])  # written by benchmarks.compare_servers.network
DESCRIPTION = json.loads((FOLDER / "description.json").read_text(encoding="utf-8"))


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode, resize and crop an image file: (H, W, 3) uint8."""
    resize_px, input_px = DESCRIPTION["resize_px"], DESCRIPTION["input_px"]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = (resize_px if side == short else int(resize_px * side / short) for side in image.size)
    left, top = round((width - input_px) / 2), round((height - input_px) / 2)
    resized = image.resize((width, height), Image.Resampling[DESCRIPTION["interpolation"]])
    return np.asarray(resized.crop((left, top, left + input_px, top + input_px)))
