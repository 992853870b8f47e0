"""Check an image file, and decode it where its cost is bounded.

The structure of a file is examined first, without decoding (``models.image_structure``). Simple and small images are decoded
in the calling thread. Large ones, and those whose cost only decoding shows, are decoded in a process that can be killed
(``service.inference.decoder_process``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from models.errors import ImageError, ImageTooLargeError, TooComplexError, UserError
from models.image_structure import Limits, Structure, examine
from models.preprocess import HAS_AVIF, HAS_HEIF, Preprocessing, unidentified
from service.http.errors import Problem, problem_from
from service.inference.decoder_process import DecoderProcess
from service.inference.decoding import PreprocessedImage, preprocess, render
from service.settings import Settings
from service.telemetry.metrics import Metrics

__all__ = ["DeferredError", "ImageDecoder", "PreprocessedImage"]

HEAVY_BYTES = 160_000_000  # memory of a thread for one image: a plain JPEG of 40 megapixels, a PNG of 10
SLOW_BYTES_PER_S = 400_000  # speed of Pillow's decoders in Python on a slow machine
OPTIONAL = (("AVIF", HAS_AVIF), ("HEIF", HAS_HEIF))  # formats that not every installation can decode
T = TypeVar("T")


class DeferredError(UserError):
    """The image has to be decoded in the process. ``is_simple`` means that it is only large."""

    def __init__(self, structure: Structure) -> None:
        super().__init__("The image has to be decoded in the decoder process.")
        self.is_simple = structure.is_simple


@dataclass
class ImageDecoder:
    """Check and decode images. It may be used by several threads.

    Args:
        limits: Limits of the images' structure.
        process: Decodes one image at a time that needs more than HEAVY_BYTES or is unusual.
        on_rejected: Called with the reason of each image that is rejected for its cost.
    """

    limits: Limits
    process: DecoderProcess
    on_rejected: Callable[[str], None] = field(default=lambda reason: None)

    @classmethod
    def of(cls, settings: Settings, metrics: Metrics | None = None) -> ImageDecoder:
        """Create the decoder of a worker from the settings."""
        limits = Limits(
            max_pixels=settings.max_pixels,
            max_scans=settings.max_jpeg_scans,
            max_segments=settings.max_image_segments,
            max_slow_bytes=int(settings.decode_timeout_s * SLOW_BYTES_PER_S),
        )
        metrics = metrics or Metrics()
        process = DecoderProcess(
            max_pixels=settings.max_pixels,
            max_body_bytes=settings.max_body_bytes,
            timeout_s=settings.decode_timeout_s,
            count=lambda outcome: metrics.isolated_decodes.labels(outcome).inc(),
        )
        return cls(limits, process, lambda reason: metrics.images_rejected.labels(reason).inc())

    def preprocess(
        self, data: bytes, preprocessing: Preprocessing, *, block: bool = True, within_s: float = math.inf
    ) -> PreprocessedImage:
        """Check, decode, resize and crop an image.

        Args:
            data: The file.
            preprocessing: What the network takes.
            block: Whether the thread may wait for the decoder process.
            within_s: For how long, at most.

        Raises:
            Problem: The image is rejected.
            DeferredError: It has to be decoded in the process, and ``block`` is false.
            DecoderBusyError: ``within_s`` passed.
        """
        in_thread = partial(preprocess, data, preprocessing, max_pixels=self.limits.max_pixels)

        def in_process() -> PreprocessedImage:
            fields, pixels = self.process.run(
                "preprocess", data, within_s=within_s, preprocessing=asdict(preprocessing), max_pixels=self.limits.max_pixels
            )
            array = np.frombuffer(pixels, np.uint8).reshape(fields.pop("shape"))
            return PreprocessedImage(array, **{**fields, "notes": tuple(fields["notes"])})

        return self._run(data, in_thread, in_process, block=block)

    def render(self, data: bytes, *, max_side_px: int, quality: int) -> bytes:
        """Check an image and render it for people; see ``service.inference.decoding.render``. Raises Problem."""
        arguments = {"max_side_px": max_side_px, "quality": quality, "max_pixels": self.limits.max_pixels}
        in_thread = partial(render, data, **arguments)
        return self._run(data, in_thread, lambda: self.process.run("render", data, **arguments)[1], block=True)

    def check(self, data: bytes) -> Structure:
        """Check the structure of an image without decoding it. Raises Problem if the image is rejected."""
        try:
            structure = self._examine(data)
            if structure.format in (None, *(name for name, is_supported in OPTIONAL if not is_supported)):
                raise unidentified(data)
            return structure
        except ImageError as error:
            raise self._rejected(error) from None

    def _examine(self, data: bytes) -> Structure:
        if not data:
            raise Problem("empty_image", "The file is empty.")
        return examine(data, self.limits)

    def _rejected(self, error: ImageError) -> Exception:
        if isinstance(error, (ImageTooLargeError, TooComplexError)):
            self.on_rejected(error.reason if isinstance(error, TooComplexError) else "pixels")
        return problem_from(error) or error

    def _run(self, data: bytes, in_thread: Callable[[], T], in_process: Callable[[], T], *, block: bool) -> T:
        try:
            structure = self._examine(data)
            if structure.is_simple and structure.memory <= HEAVY_BYTES:
                return in_thread()
            if not block:
                raise DeferredError(structure)
            return in_process()
        except ImageError as error:
            raise self._rejected(error) from None
