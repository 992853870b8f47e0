"""Inspect each image once: its sha256, whether it decodes, a fingerprint for duplicate search, and the network's input.

A file is read once, so that everything that is known about an image belongs to the bytes of its sha256, even if the file is
replaced meanwhile. Fingerprints are cached on disk by sha256.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from finetune.data.image_files import read_image_file, unreadable
from finetune.data.image_folder import Sample
from finetune.data.odd_files import MEASURES, measure_image, odd_file_column
from finetune.io.array_store import ArrayStore
from finetune.io.progress import ImageCounter
from finetune.io.threaded_map import threaded_map
from models.errors import DataError, ImageError
from models.preprocess import MIN_DECODE_PX, Preprocessing, decode, decoder_versions

THUMB_PX = 16
APPEARANCE_BYTES = 8 + 3 * THUMB_PX**2  # size of a fingerprint for the duplicate search
EXACT_PX = 32  # the perceptual hash works at this size and cannot tell images this small apart


class ChangedImageError(DataError):
    """An inspected image cannot be read any more, or its content has changed."""


class PixelConsumer(Protocol):
    """Takes the network's input of images during an inspection, such as a cache that computes their features.

    ``needs`` is called in several threads, the others in one. ``finish`` follows the last image; ``flush`` saves the results
    so far, also after an interrupt.
    """

    def needs(self, sha256: str) -> bool: ...
    def add(self, sha256: str, pixels: NDArray[np.uint8]) -> None: ...
    def finish(self) -> None: ...
    def flush(self) -> None: ...


class BatchingConsumer(ABC):
    """A PixelConsumer that processes images in batches."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._pending: dict[str, NDArray[np.uint8]] = {}

    @abstractmethod
    def has_result(self, sha256: str) -> bool:
        """Return whether an image was processed before."""

    @abstractmethod
    def process(self, sha256s: Sequence[str], pixels: NDArray[np.uint8]) -> None:
        """Process a batch of different images (N, H, W, C) and keep the results."""

    @abstractmethod
    def flush(self) -> None:
        """Save the results so far."""

    def needs(self, sha256: str) -> bool:
        """Return whether an image has not been processed or added yet."""
        return not self.has_result(sha256) and sha256 not in self._pending

    def add(self, sha256: str, pixels: NDArray[np.uint8]) -> None:
        """Add an image, and process a batch once it is full."""
        if self.needs(sha256):
            self._pending[sha256] = pixels
        if len(self._pending) >= self._batch_size:
            self.finish()

    def finish(self) -> None:
        """Process the last batch."""
        if self._pending:
            self.process(list(self._pending), np.stack(list(self._pending.values())))
            self._pending.clear()


@dataclass(frozen=True)
class ImageRecord:
    """Inspection result of one image.

    ``fingerprint`` is (8 + 768 + 24,) uint8: a perceptual hash, a thumbnail, and the bytes of ``measure_image``.
    """

    sample: Sample
    sha256: str
    fingerprint: NDArray[np.uint8] | None
    error: str | None

    @property
    def measures(self) -> NDArray[np.float32]:
        """What ``odd_files.measure_image`` measured. The image must be readable."""
        assert self.fingerprint is not None
        return self.fingerprint[APPEARANCE_BYTES:].copy().view(np.float32)


def inspect_images(
    samples: Sequence[Sample],
    *,
    store: ArrayStore,
    preprocessing: Preprocessing | None = None,
    consumer: PixelConsumer | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> list[ImageRecord]:
    """Inspect images in threads.

    Args:
        samples: The images to inspect.
        store: Fingerprint cache, created with ``fingerprint_context`` for the ``decode_px`` of ``preprocessing``.
        preprocessing: If set, images are decoded at the resolution it needs.
        consumer: If set, it is given the network's input of the images that it needs, as ``preprocessing`` crops it.
        workers: Number of threads; 0 for one per CPU.
        quiet: Hide the progress bar.

    Returns:
        One record per sample, in order.
    """
    decode_px = preprocessing.decode_px if preprocessing else MIN_DECODE_PX
    store.index()
    bar = tqdm(total=len(samples), desc="inspecting images", unit="image", disable=quiet or None, leave=False)
    counter = ImageCounter("inspection", len(samples))

    def inspect(sample: Sample) -> tuple[ImageRecord, NDArray[np.uint8] | None]:
        try:
            data = read_image_file(sample.path)
        except (ImageError, OSError) as error:
            return ImageRecord(sample, "", None, _reason(error)), None
        sha256 = hashlib.sha256(data).hexdigest()
        is_needed = consumer is not None and consumer.needs(sha256)
        if sha256 in store and not is_needed:
            return ImageRecord(sample, sha256, None, None), None
        try:
            image, size = _decode_with_size(data, decode_px)
        except ImageError as error:
            return ImageRecord(sample, sha256, None, str(error)), None
        pixels = preprocessing.crop(image) if preprocessing and is_needed else None
        return ImageRecord(sample, sha256, None if sha256 in store else fingerprint(image, size), None), pixels

    records: list[ImageRecord] = []
    try:
        for record, pixels in threaded_map(inspect, samples, workers=workers):
            if record.fingerprint is not None:
                store.add(record.sha256, record.fingerprint)
            if consumer is not None and pixels is not None:
                consumer.add(record.sha256, pixels)
            records.append(record)
            bar.update()
            counter.add()
        if consumer is not None:
            consumer.finish()
    finally:
        bar.close()
        store.flush()
        if consumer is not None:
            consumer.flush()
    cached = store.load(record.sha256 for record in records if record.fingerprint is None and record.error is None)
    return [_with_fingerprint(record, cached, decode_px) for record in records]


def table_columns(records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Return columns of images as arguments of ``Predictions``: groups, facets, and what is odd about the files, in order."""
    names = dict.fromkeys(name for record in records for name in record.sample.facets)
    return {
        "groups": tuple(record.sample.group for record in records),
        "facets": {name: tuple(record.sample.facets.get(name, "") for record in records) for name in names},
        "odd_files": odd_file_column([record.measures for record in records]),
    }


def read_pixels(record: ImageRecord, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode and crop an inspected image again: (H, W, C) uint8. Raises ChangedImageError."""
    return preprocessing.pixels(read_inspected(record.sample.path, record.sha256))


def read_inspected(path: Path, sha256: str) -> bytes:
    """Read an image that was inspected before.

    Raises:
        ChangedImageError: It cannot be read, or its sha256 differs.
    """
    try:
        data = read_image_file(path)
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ChangedImageError(f"{path} can no longer be read ({reason}). Put it back.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ChangedImageError(f"{path} has changed since it was inspected. Restore it.")
    return data


def _with_fingerprint(record: ImageRecord, cached: Mapping[str, NDArray[np.uint8]], decode_px: int) -> ImageRecord:
    """Add the cached fingerprint. It is computed again if another run has pruned the cache meanwhile."""
    if record.error is not None or record.fingerprint is not None:
        return record
    if record.sha256 in cached:
        return replace(record, fingerprint=cached[record.sha256])
    try:
        data = read_inspected(record.sample.path, record.sha256)
        return replace(record, fingerprint=fingerprint(*_decode_with_size(data, decode_px)))
    except ChangedImageError:
        return replace(record, error="the file changed while it was read")


def _decode_with_size(data: bytes, decode_px: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image, possibly at a reduced size. Returns its full width and height as well. Raises ImageError."""
    sizes: list[tuple[int, int]] = []
    image = decode(data, min_side_px=decode_px, inspect=lambda opened: sizes.append(opened.size))
    return image, sizes[-1]


def _reason(error: Exception) -> str:
    return unreadable(error) if isinstance(error, OSError) else str(error)


def fingerprint_context(decode_px: int = MIN_DECODE_PX) -> dict[str, Any]:
    """Return the cache context of fingerprints: all that they depend on besides the image.

    Large JPEGs are decoded at a reduced size of at least ``decode_px``, which slightly changes the fingerprint.
    """
    return {
        "what": "fingerprint",
        "measures": MEASURES,
        "phash_bits": 64,
        "thumb_px": THUMB_PX,
        "exact_px": EXACT_PX,
        "decode_px": decode_px,
        "finds_missing_pixels": True,  # a fingerprint stands for an image that decodes
        **decoder_versions(),
    }


def fingerprint(image: Image.Image, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Compute a fingerprint: 8 bytes of perceptual hash and a 16 x 16 RGB thumbnail for duplicate search, and six measures.

    The hash is imagehash's `phash <https://github.com/JohannesBuchner/imagehash>`_. For images of up to 32 x 32 px it is
    replaced by the start of the sha256 of the pixels, so that only exact repeats match.

    Args:
        image: The image, which may have been decoded at a reduced size.
        size: Its full width and height, if it was.

    Returns:
        (800,) uint8.
    """
    small = image.reduce(max(1, min(image.size) // 128))
    if max(image.size) <= EXACT_PX:
        bits = np.frombuffer(hashlib.sha256(image.tobytes()).digest()[:8], dtype=np.uint8)
    else:
        bits = np.packbits(imagehash.phash(small).hash.flatten())
    thumb = small.resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
    measures = measure_image(image, size or image.size).view(np.uint8)
    return np.concatenate([bits, np.asarray(thumb).reshape(-1), measures])
