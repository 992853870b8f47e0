"""Hold the network's input of all images in memory, so that training from random weights decodes each image once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data.image_folder import Sample
from finetune.data.inspection import ImageRecord, read_pixels
from finetune.io.threaded_map import threaded_map
from models.preprocess import Preprocessing

MAX_BYTES = 512 * 2**20  # 680,000 gray images of 28 px, 170,000 color images of 32 px or 3,500 of 224 px


class PixelMemory:
    """Collects the network's input of images by sha256 while they are inspected (a ``PixelConsumer``)."""

    def __init__(self, preprocessing: Preprocessing, *, workers: int = 0) -> None:
        self._preprocessing = preprocessing
        self._workers = workers
        self._pixels: dict[str, NDArray[np.uint8]] = {}

    def can_hold(self, samples: Sequence[Sample], *, augmented: bool) -> bool:
        """Return whether images fit into the memory limit.

        Args:
            samples: The images.
            augmented: Whether random crops are drawn from them. Then images that are larger than the network's input must be
                decoded again, because a crop from the reduced image would be less sharp.
        """
        side = self._preprocessing.input_px
        if len(samples) * side**2 * self._preprocessing.channels > MAX_BYTES:
            return False
        return not augmented or all(_size(sample) == (side, side) for sample in samples)

    def needs(self, sha256: str) -> bool:
        return sha256 not in self._pixels

    def add(self, sha256: str, pixels: NDArray[np.uint8]) -> None:
        self._pixels[sha256] = pixels

    def finish(self) -> None:
        """Do nothing, as no image is pending."""

    def flush(self) -> None:
        """Do nothing, as nothing is written to disk."""

    def take(self, records: Sequence[ImageRecord]) -> NDArray[np.uint8]:
        """Return the pixels (N, H, W, C) of images and forget them. Images that were not collected are decoded."""
        missing = {record.sha256: record for record in records if record.sha256 not in self._pixels}
        decoded = threaded_map(lambda record: read_pixels(record, self._preprocessing), missing.values(), workers=self._workers)
        self._pixels.update(zip(missing, decoded, strict=True))
        pixels = np.stack([self._pixels[record.sha256] for record in records])
        for record in records:
            self._pixels.pop(record.sha256, None)
        return pixels


def _size(sample: Sample) -> tuple[int, int] | None:
    try:
        with Image.open(sample.path) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
