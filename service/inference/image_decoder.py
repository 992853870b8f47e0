"""The front door: from a photo's bytes to the pixels that the model takes, or a typed rejection before a pixel is decoded.

A photo is examined first, without decoding (``models.image_structure``). What is simple and small is decoded in the thread
that asks, as its time and memory are bounded. What is large, or of a shape whose cost only decoding tells, is decoded in a
process that can be killed (``service.inference.decoder_process``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from models.errors import ImageError, ImageTooLargeError, TooComplexError, UnsupportedImageError, UserError
from models.image_structure import Limits, Structure, examine
from models.preprocess import Preprocessing
from service.http.errors import Problem
from service.inference.decoder_process import DecoderProcess
from service.inference.decoding import PreprocessedImage, RenderedImage, preprocess, render
from service.settings import Settings
from service.telemetry.metrics import Metrics

__all__ = ["DeferredError", "ImageDecoder", "PreprocessedImage"]

HEAVY_BYTES = 160_000_000  # what a thread may take to decode one photo: a plain JPEG of 40 megapixels, a PNG of 10
SLOW_BYTES_PER_S = 400_000  # what Pillow's decoders in Python manage on a slow machine
T = TypeVar("T")


class DeferredError(UserError):
    """The photo has to be decoded in a process, which takes time; ``is_simple`` says that it is only large."""

    def __init__(self, structure: Structure) -> None:
        super().__init__("The photo has to be decoded in a process.")
        self.is_simple = structure.is_simple


@dataclass
class ImageDecoder:
    """Check and decode photos of at most ``limits.max_pixels``, in several threads.

    A thread takes HEAVY_BYTES at most; all else is decoded by ``process``, one photo at a time. So memory is bounded by both.
    """

    limits: Limits
    process: DecoderProcess
    on_rejected: Callable[[str], None] = field(default=lambda reason: None)

    @classmethod
    def of(cls, settings: Settings, metrics: Metrics | None = None) -> ImageDecoder:
        """The door that the settings describe; one for each worker, so that there is one process for each."""
        limits = Limits(
            max_pixels=settings.max_pixels,
            max_scans=settings.max_jpeg_scans,
            max_segments=settings.max_image_segments,
            max_slow_bytes=int(settings.decode_timeout_s * SLOW_BYTES_PER_S),
        )
        count: Callable[[str], None] = lambda outcome: None  # noqa: E731
        rejected = count
        if metrics:
            count, rejected = metrics.count_isolated, metrics.count_rejected
        process = DecoderProcess(
            max_pixels=settings.max_pixels,
            max_body_bytes=settings.max_body_bytes,
            timeout_s=settings.decode_timeout_s,
            count=count,
        )
        return cls(limits, process, rejected)

    def preprocess(
        self, data: bytes, preprocessing: Preprocessing, *, block: bool = True, within_s: float = math.inf
    ) -> PreprocessedImage:
        """Check, decode and crop a photo.

        Args:
            data: The file.
            preprocessing: What the network takes.
            block: Whether the thread may wait for the decoder process.
            within_s: How long, at most.

        Raises:
            Problem: The photo is rejected.
            DeferredError: It has to be decoded in the process, and ``block`` is false.
            DecoderBusyError: ``within_s`` was over.
        """
        here = partial(preprocess, data, preprocessing, max_pixels=self.limits.max_pixels)

        def there() -> PreprocessedImage:
            fields, pixels = self.process.run(
                "preprocess", data, within_s=within_s, preprocessing=asdict(preprocessing), max_pixels=self.limits.max_pixels
            )
            array = np.frombuffer(pixels, np.uint8).reshape(fields.pop("shape"))
            return PreprocessedImage(array, **{**fields, "notes": tuple(fields["notes"])})

        return self._guarded(data, here, there, block=block)

    def render(self, data: bytes, *, max_side_px: int, quality: int) -> RenderedImage:
        """Check a photo and make a picture of it for people (``service.inference.decoding.render``). Raises Problem."""
        arguments = {"max_side_px": max_side_px, "quality": quality, "max_pixels": self.limits.max_pixels}

        def there() -> RenderedImage:
            fields, made = self.process.run("render", data, **arguments)
            return RenderedImage(made, **fields)

        return self._guarded(data, partial(render, data, **arguments), there, block=True)

    def _guarded(self, data: bytes, here: Callable[[], T], there: Callable[[], T], *, block: bool) -> T:
        if not data:
            raise Problem("empty_image", "The file that arrived has no bytes; send a photo.")
        try:
            structure = examine(data, self.limits)
            if structure.is_simple and structure.memory <= HEAVY_BYTES:
                return here()
            if not block:
                raise DeferredError(structure)
            return there()
        except UnsupportedImageError as error:
            raise Problem("not_an_image", str(error)) from None
        except ImageTooLargeError as error:
            self.on_rejected("pixels")
            raise Problem("too_many_pixels", str(error)) from None
        except TooComplexError as error:
            self.on_rejected(error.reason)
            raise Problem("image_too_complex", str(error)) from None
        except ImageError as error:
            raise Problem("damaged_image", str(error)) from None
