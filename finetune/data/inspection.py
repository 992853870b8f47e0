"""Inspect each image once: its sha256, whether it decodes, a fingerprint for duplicate search, and the network's input.

Fingerprints are cached on disk by sha256. Decoded pixels stay in memory, up to a limit, until the frozen layers have
processed them, so that images are not decoded twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import PIL
import PIL.features
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from finetune.data.image_files import read_image_file
from finetune.data.image_folder import Sample
from finetune.io.array_store import ArrayStore
from finetune.io.threaded_map import threaded_map
from models.artifacts.atomic_io import sha256_of
from models.errors import DataError, ImageError
from models.preprocess import MIN_DECODE_PX, Preprocessing, decode

THUMB_PX = 16
EXACT_PX = 32  # the perceptual hash works at this size and cannot tell images this small apart


class ChangedImageError(DataError):
    """An inspected image cannot be read any more, or its content has changed."""


@dataclass(frozen=True)
class ImageRecord:
    """Inspection result of one image. ``fingerprint`` (8 + 768,) uint8 is its perceptual hash followed by a thumbnail."""

    sample: Sample
    sha256: str
    fingerprint: NDArray[np.uint8] | None
    error: str | None


@dataclass
class PixelCache:
    """Decoded and cropped images by sha256, up to ``limit_mb``. Images that do not fit are decoded again when needed."""

    preprocessing: Preprocessing
    limit_mb: int = 1024
    pixels: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def add(self, sha256: str, image: Image.Image) -> None:
        size = self.preprocessing.input_px**2 * self.preprocessing.channels
        if (len(self.pixels) + 1) * size <= self.limit_mb * 1_000_000:
            self.pixels[sha256] = self.preprocessing.crop(image)

    def pop(self, sha256: str, path: Path) -> NDArray[np.uint8]:
        """Remove the pixels (H, W, C) from the cache and return them, decoding ``path`` if they are not cached."""
        cached = self.pixels.pop(sha256, None)
        return cached if cached is not None else self.preprocessing.pixels(read_inspected(path, sha256))


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


def inspect_images(
    samples: Sequence[Sample],
    *,
    store: ArrayStore,
    pixel_cache: PixelCache | None = None,
    select_pixels: Callable[[Sequence[str]], set[str]] | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> list[ImageRecord]:
    """Inspect images in threads.

    Args:
        samples: The images to inspect.
        store: Fingerprint cache, created with ``fingerprint_context`` for the ``decode_px`` of ``pixel_cache``.
        pixel_cache: If set, images are decoded at the resolution it needs, and the selected ones are added to it.
        select_pixels: Takes all sha256s and returns those whose pixels to add to ``pixel_cache``.
        workers: Number of threads; 0 for one per CPU.
        quiet: Hide the progress bar.

    Returns:
        One record per sample, in order.
    """
    decode_px = pixel_cache.preprocessing.decode_px if pixel_cache else MIN_DECODE_PX
    sha256s = list(threaded_map(lambda sample: _sha256(sample.path), samples, workers=workers))
    known = store.load([sha for sha in sha256s if sha])
    keep = select_pixels([sha for sha in sha256s if sha]) if select_pixels else set()
    bar = tqdm(total=len(samples), desc="inspecting images", unit="image", disable=quiet or None, leave=False)

    def inspect(pair: tuple[Sample, str]) -> ImageRecord:
        sample, sha256 = pair
        if not sha256:
            return ImageRecord(sample, sha256, None, "the file cannot be read")
        if sha256 in known and sha256 not in keep:
            return ImageRecord(sample, sha256, known[sha256], None)
        try:
            image = decode(read_inspected(sample.path, sha256), min_side_px=decode_px)
        except ChangedImageError:
            return ImageRecord(sample, sha256, None, "the file changed while it was read")
        except ImageError as error:
            return ImageRecord(sample, sha256, None, str(error))
        if pixel_cache and sha256 in keep:
            pixel_cache.add(sha256, image)
        return ImageRecord(sample, sha256, known[sha256] if sha256 in known else fingerprint(image), None)

    records = []
    for result in threaded_map(inspect, zip(samples, sha256s, strict=True), workers=workers):
        if result.fingerprint is not None and result.sha256 not in known:
            store.add(result.sha256, result.fingerprint)
        records.append(result)
        bar.update()
    bar.close()
    store.flush()
    return records


def fingerprint_context(decode_px: int = MIN_DECODE_PX) -> dict[str, Any]:
    """Return the cache context of fingerprints: all that they depend on besides the image.

    Large JPEGs are decoded at a reduced size of at least ``decode_px``, which slightly changes the fingerprint.
    """
    return {
        "what": "fingerprint",
        "phash_bits": 64,
        "thumb_px": THUMB_PX,
        "exact_px": EXACT_PX,
        "decode_px": decode_px,
        "pillow": PIL.__version__,
        "jpeg": PIL.features.version("jpg"),
    }


def fingerprint(image: Image.Image) -> NDArray[np.uint8]:
    """Compute a fingerprint for duplicate search: 8 bytes of perceptual hash and a 16 x 16 RGB thumbnail, (776,) uint8.

    The hash is imagehash's `phash <https://github.com/JohannesBuchner/imagehash>`_. For images of up to 32 x 32 px it is
    replaced by the start of the sha256 of the pixels, so that only exact repeats match.
    """
    small = image.reduce(max(1, min(image.size) // 128))
    if max(image.size) <= EXACT_PX:
        bits = np.frombuffer(hashlib.sha256(image.tobytes()).digest()[:8], dtype=np.uint8)
    else:
        bits = np.packbits(imagehash.phash(small).hash.flatten())
    thumb = small.resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
    return np.concatenate([bits, np.asarray(thumb).reshape(-1)])


def _sha256(path: Path) -> str:
    """Return the file's sha256, or "" if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return ""
