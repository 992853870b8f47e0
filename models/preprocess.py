"""From a photo's bytes to the pixels that a network sees: decode, turn upright, resize, crop.

Normalisation is the network's first layer (``models.classifier.Normalise``), so that the exported graph takes pixels.

Pillow and NumPy only, written once: training wraps these functions as its ImageFolder loader and transform, the service
calls them as they are, and so both see the same pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import PhotoError

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its pictures: the shorter side to ``resize_px``, the middle ``input_px`` square, normalised.

    ``mean`` and ``std`` are of pixels scaled to 0..1, one a channel: three for RGB, one for grey.
    """

    input_px: int = 224
    resize_px: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def sha256(self) -> str:
        """Name this preprocessing by its content, so that a change of it cannot go unseen."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def crop(self, photo: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop ``photo`` to what the network sees.

        Only the part that survives the crop is resampled; the pixels are those of torchvision's Resize and CenterCrop.
        Returns (input_px, input_px, channels) uint8.
        """
        width, height = photo.size
        short = min(width, height)
        new_width = self.resize_px if width == short else int(self.resize_px * width / short)
        new_height = self.resize_px if height == short else int(self.resize_px * height / short)
        left = round((new_width - self.input_px) / 2.0)
        top = round((new_height - self.input_px) / 2.0)
        box = (
            left * width / new_width,
            top * height / new_height,
            (left + self.input_px) * width / new_width,
            (top + self.input_px) * height / new_height,
        )
        square = photo.resize((self.input_px, self.input_px), INTERPOLATIONS[self.interpolation], box)
        pixels = np.asarray(square.convert("RGB" if self.channels == 3 else "L"))
        return pixels.reshape(self.input_px, self.input_px, self.channels)


def decode(data: bytes) -> Image.Image:
    """Decode a photo's bytes: first frame, upright by its EXIF orientation, RGB whatever it was.

    Transparent parts become white; 16-bit grey is scaled to 8 bit, not clipped; CMYK is converted.
    Raises PhotoError for bytes that are no picture, and for a picture that breaks off.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is no reason to refuse the pixels
            with Image.open(io.BytesIO(data)) as photo:
                photo.load()
                return to_rgb(ImageOps.exif_transpose(photo))
    except UnidentifiedImageError:
        raise PhotoError(
            f"{len(data)} bytes arrived that are not a picture; send a JPEG, PNG, WebP, GIF, BMP or TIFF file."
        ) from None
    except Image.DecompressionBombError as error:
        raise PhotoError(f"The picture is too large to decode safely ({error}); send a smaller one.") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data: struct.error, SyntaxError, ...
        raise PhotoError(f"The picture is damaged and cannot be decoded ({error}); send it again or another.") from None


def to_rgb(photo: Image.Image) -> Image.Image:
    """Any mode that Pillow knows -> RGB, without losing what a person sees."""
    if photo.mode == "RGB":
        return photo
    if photo.mode.startswith("I") or photo.mode == "F":
        return _from_deep_grey(photo).convert("RGB")
    if photo.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in photo.info:
        overlay = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), overlay).convert("RGB")
    return photo.convert("RGB")


def _from_deep_grey(photo: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey -> 8-bit grey; Pillow's own convert would clip everything over 255 to white."""
    values = np.asarray(photo, dtype=np.float64)
    top = 65535.0 if photo.mode.startswith("I") else float(values.max(initial=0.0))
    if photo.mode == "F" and top <= 1.0:
        top = 1.0
    elif values.max(initial=0.0) <= 255.0:
        top = 255.0
    return Image.fromarray(np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8), "L")
