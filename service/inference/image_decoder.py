"""The front door: from a photo's bytes to the pixels that the model takes, or a typed refusal before a pixel is decoded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from models.errors import ImageError, ImageTooLargeError, UnsupportedImageError, UserError
from models.preprocess import ImageInspector, Preprocessing, decode
from models.runtime.openvino_engine import Pixels
from service.http.errors import Problem

LARGE_IMAGE_PIXELS = 16_000_000
T = TypeVar("T")
ANIMATED = {"GIF", "PNG", "WEBP", "TIFF"}  # a phone's JPEG may hold a second picture, but not an animation


@dataclass(frozen=True)
class PreprocessedImage:
    """What the model sees of a photo: ``pixels`` (H, W, C) uint8; the size is the one that arrived."""

    pixels: Pixels
    width_px: int
    height_px: int
    format: str
    notes: tuple[str, ...] = ()


class DecoderBusyError(UserError):
    """Another heavy photo is being decoded: to be tried again when it is not ``is_busy``, not waited for in a thread."""


@dataclass
class ImageDecoder:
    """Decode photos in several threads, of at most ``max_pixels`` each, and of the heavy ones one at a time.

    So the memory for decoding is bounded by one photo of ``max_pixels`` and, for each other thread, one of LARGE_IMAGE_PIXELS.
    With ``block`` a thread waits for its turn with a heavy photo, and DecoderBusyError is never raised.
    """

    max_pixels: int
    block: bool = False
    _heavy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_busy(self) -> bool:
        """Whether a heavy photo is being decoded."""
        return self._heavy.locked()

    def preprocess(self, data: bytes, preprocessing: Preprocessing) -> PreprocessedImage:
        """Check, decode and crop a photo. Raises Problem, and DecoderBusyError while another heavy photo is being decoded."""
        seen: dict[str, Any] = {}

        def look(photo: Image.Image) -> None:
            seen.update(width_px=photo.width, height_px=photo.height, format=photo.format or "", notes=_notes(photo))

        pixels = self._guarded(data, lambda inspect: preprocessing.pixels(data, inspect=inspect), look)
        return PreprocessedImage(pixels, **seen)

    def decode(self, data: bytes, *, min_side_px: int, on_open: ImageInspector) -> Image.Image:
        """Check and decode a photo for people: upright, in RGB, a large one coarser (``models.preprocess.decode``).

        ``look`` is given the opened photo before a pixel of it is decoded. Raises as ``preprocess`` does.
        """
        return self._guarded(data, lambda inspect: decode(data, min_side_px=min_side_px, inspect=inspect), on_open)

    def _guarded(self, data: bytes, make: Callable[[ImageInspector], T], look: ImageInspector) -> T:
        if not data:
            raise Problem("empty_photo", "The file that arrived has no bytes; send a photo.")
        with contextlib.ExitStack() as held:

            def inspect(photo: Image.Image) -> None:
                self._check_size(photo)
                if photo.width * photo.height > LARGE_IMAGE_PIXELS:
                    if not self._heavy.acquire(blocking=self.block):
                        raise DecoderBusyError
                    held.callback(self._heavy.release)
                look(photo)

            try:
                return make(inspect)
            except UnsupportedImageError as error:
                raise Problem("not_a_picture", str(error)) from None
            except ImageTooLargeError as error:
                raise Problem("too_many_pixels", str(error)) from None
            except ImageError as error:
                raise Problem("damaged_picture", str(error)) from None

    def _check_size(self, photo: Image.Image) -> None:
        if photo.width * photo.height > self.max_pixels:
            raise Problem(
                "too_many_pixels",
                f"The photo is {photo.width:,} x {photo.height:,} pixels and {self.max_pixels:,} in all are allowed; "
                "send it smaller.",
            )


def _notes(photo: Image.Image) -> tuple[str, ...]:
    if photo.format in ANIMATED and getattr(photo, "is_animated", False):
        return ("It has several frames; the first was classified.",)
    return ()
