"""From a photo's bytes to the pixels that a network sees: decode, turn upright, resize, crop.

Normalisation is the network's first layer (``models.networks.classifier.Normalize``), so that the exported graph takes pixels.

Pillow and NumPy only, written once: training and the service both call ``Preprocessing.pixels``, and so see the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import ImageError, ImageTooLargeError, TooComplexError, UnsupportedImageError, UserError
from models.image_structure import DEFAULT_LIMITS, Limits, examine

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not Pillow's others: EPS, say, starts Ghostscript
IMAGE_FORMATS_TEXT = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"
MIN_DECODE_PX = 512
ImageInspector = Callable[[Image.Image], None]

# Pillow warns of odd metadata, which is no reason to refuse the pixels. Not in decode: catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


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

    @property
    def decode_px(self) -> int:
        """The shorter side that a large photo keeps at least when it is decoded: twice what it is resized to, 512 or more.

        JPEG can be decoded at a half, a quarter or an eighth of its size. For a phone's 12-megapixel photo that takes a
        third of the time; the crop differs by 0.3 levels in the mean, and in 99 of 100 values by 2 at most.
        """
        return max(MIN_DECODE_PX, 2 * self.resize_px)

    def sha256(self) -> str:
        """Name this preprocessing by its content, so that a change of it cannot go unseen."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def decode(
        self, data: bytes, *, inspect: ImageInspector | None = None, limits: Limits | None = DEFAULT_LIMITS
    ) -> Image.Image:
        """Decode a photo's bytes as far as this network needs it (``decode_px``). Raises ImageError."""
        return decode(data, min_side_px=self.decode_px, inspect=inspect, limits=limits)

    def pixels(
        self, data: bytes, *, inspect: ImageInspector | None = None, limits: Limits | None = DEFAULT_LIMITS
    ) -> NDArray[np.uint8]:
        """From a photo's bytes to what the network sees: (input_px, input_px, channels) uint8. Raises ImageError."""
        return self.crop(self.decode(data, inspect=inspect, limits=limits))

    def crop(self, photo: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop ``photo`` to what the network sees.

        Only the part that survives the crop is resampled; the pixels are those of torchvision's Resize and CenterCrop, but
        for rounding: a few in a thousand differ by 1 level, seldom 2. Returns (input_px, input_px, channels) uint8.
        """
        short_px = min(photo.size)
        x_first, x_end, left, right = self._kept(photo.width, short_px)
        y_first, y_end, top, bottom = self._kept(photo.height, short_px)
        part = photo.crop((x_first, y_first, x_end, y_end))
        # One direction at a time: which one Pillow takes first depends on its version, and the pixels on that.
        resample = INTERPOLATIONS[self.interpolation]
        narrow = part.resize((self.input_px, part.height), resample, (left, 0, right, part.height))
        square = narrow.resize((self.input_px, self.input_px), resample, (0, top, self.input_px, bottom))
        pixels = np.asarray(_as_mode(square, "RGB" if self.channels == 3 else "L"))
        return pixels.reshape(self.input_px, self.input_px, self.channels)

    def _kept(self, side_px: int, short_px: int) -> tuple[int, int, float, float]:
        """Along one side: the first pixel that the crop needs, the end of them, and where in them the crop begins and ends."""
        new_px = self.resize_px if side_px == short_px else int(self.resize_px * side_px / short_px)
        offset_px = round((new_px - self.input_px) / 2.0)
        begin, end = offset_px * side_px / new_px, (offset_px + self.input_px) * side_px / new_px
        reach = 2 * max(1.0, side_px / new_px) + 1  # no filter looks further
        first = max(0, math.floor(begin - reach))
        return first, min(side_px, math.ceil(end + reach)), begin - first, end - first


def decode(
    data: bytes,
    *,
    min_side_px: int | None = None,
    inspect: ImageInspector | None = None,
    limits: Limits | None = DEFAULT_LIMITS,
) -> Image.Image:
    """Decode a photo's bytes: first frame, upright by its EXIF orientation, RGB whatever it was.

    Transparent parts become white; 16-bit grey is scaled to 8 bit, not clipped; CMYK is converted. With ``min_side_px`` a
    large photo may come at a half of its size, a quarter and so on, as long as its shorter side keeps that many pixels.
    ``inspect`` is given the opened photo before a pixel of it is decoded, and may refuse it with a UserError of its own.
    Files that are built to be slow are rejected by their structure; ``limits`` is None where that was examined before.
    Raises ImageError for bytes that are no picture, and for a picture that breaks off.
    """
    if limits:
        examine(data, limits)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            if inspect:
                inspect(file)
            if min_side_px:
                file.draft(None, (min_side_px, min_side_px))
            file.load()
            photo = _reduced(file, min_side_px) if min_side_px else file
            with contextlib.suppress(Exception):  # EXIF that cannot be read: the pixels are as good as ever
                ImageOps.exif_transpose(photo, in_place=True)
            return to_rgb(photo)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UnsupportedImageError(
            f"{len(data)} bytes arrived that are not a picture; send a {IMAGE_FORMATS_TEXT} file."
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"The picture is too large to decode safely ({error}); send a smaller one.") from None
    except MemoryError:
        raise TooComplexError("memory", "Decoding the image needs too much memory; save it again as a smaller JPEG.") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data: struct.error, SyntaxError, ...
        raise ImageError(f"The picture is damaged and cannot be decoded ({error}); send it again or another.") from None


def _reduced(photo: Image.Image, min_side_px: int) -> Image.Image:
    """Halve a large photo before anything else converts it: at full size that would take many times its memory."""
    halvings = int(math.log2(max(1, min(photo.size) // min_side_px)))
    if halvings == 0:
        return photo
    info = photo.info
    if photo.mode in ("1", "P", "PA"):
        photo = photo.convert("RGBA" if photo.has_transparency_data else "RGB")
    elif photo.mode.startswith("I;"):
        photo = photo.convert("I")
    small = photo.reduce(2**halvings)
    small.info = info  # transparency, and the EXIF that tells which side is up
    return small


def to_rgb(photo: Image.Image) -> Image.Image:
    """Any mode that Pillow knows -> RGB, without losing what a person sees."""
    if photo.mode.startswith("I") or photo.mode == "F":
        return _from_deep_grey(photo).convert("RGB")
    if photo.has_transparency_data:
        overlay = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), overlay).convert("RGB")
    return _as_mode(photo, "RGB")


def _as_mode(photo: Image.Image, mode: str) -> Image.Image:
    """Convert, but do not copy what is so already, as Pillow would."""
    return photo if photo.mode == mode else photo.convert(mode)


def _from_deep_grey(photo: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey -> 8-bit grey; Pillow's own convert would clip everything over 255 to white."""
    values = np.asarray(photo, dtype=np.float32)
    highest = float(values.max(initial=0.0))
    if photo.mode == "F" and highest <= 1.0:
        top = 1.0
    elif highest <= 255.0:
        top = 255.0
    else:
        top = highest if photo.mode == "F" else 65535.0
    return Image.fromarray(np.clip(values * np.float32(255.0 / top), 0, 255).round().astype(np.uint8))
