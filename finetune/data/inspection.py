"""Look at every photo once: its sha256, whether it decodes, what it looks like, and its pixels for the network.

What a photo looks like is kept between runs under its sha256; pixels are kept in memory, within a bound, until the frozen
part has run over them, so that no photo is decoded twice.
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

from finetune.data.image_folder import Sample
from finetune.io.array_store import ArrayStore
from finetune.io.threaded_map import threaded_map
from models.artifacts.atomic_io import sha256_of
from models.errors import ImageError
from models.preprocess import MIN_DECODE_PX, Preprocessing, decode

THUMB_PX = 16
EXACT_PX = 32  # what the perceptual hash shrinks a photo to: of one no larger, any two of a kind look alike to it


@dataclass(frozen=True)
class ImageRecord:
    """What one look at a photo gave. ``fingerprint`` (8 + 768,) uint8 is its perceptual hash and a tiny picture of it."""

    sample: Sample
    sha256: str
    fingerprint: NDArray[np.uint8] | None
    error: str | None


@dataclass
class PixelCache:
    """Decoded and cropped photos by sha256, up to ``limit_mb``; what does not fit is decoded again when it is needed."""

    preprocessing: Preprocessing
    limit_mb: int = 1024
    pixels: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def add(self, sha256: str, image: Image.Image) -> None:
        size = self.preprocessing.input_px**2 * self.preprocessing.channels
        if (len(self.pixels) + 1) * size <= self.limit_mb * 1_000_000:
            self.pixels[sha256] = self.preprocessing.crop(image)

    def pop(self, sha256: str, path: Path) -> NDArray[np.uint8]:
        """The pixels (H, W, C), which the stash then forgets."""
        found = self.pixels.pop(sha256, None)
        return found if found is not None else self.preprocessing.pixels(path.read_bytes())


def inspect_images(
    samples: Sequence[Sample],
    *,
    store: ArrayStore,
    pixel_cache: PixelCache | None = None,
    select_pixels: Callable[[Sequence[str]], set[str]] | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> list[ImageRecord]:
    """Scan ``samples``, in order. ``select_pixels`` gives, of all sha256s, those whose pixels to keep.

    Photos are decoded as far as ``pixel_cache`` needs them; ``store`` is that of ``fingerprint_context`` for as many pixels.
    """
    decode_px = pixel_cache.preprocessing.decode_px if pixel_cache else MIN_DECODE_PX
    sha256s = list(threaded_map(lambda sample: _sha256(sample.path), samples, workers=workers))
    known = store.load([sha for sha in sha256s if sha])
    keep = select_pixels([sha for sha in sha256s if sha]) if select_pixels else set()
    bar = tqdm(total=len(samples), desc="looking at photos", unit="photo", disable=quiet or None, leave=False)

    def look(pair: tuple[Sample, str]) -> ImageRecord:
        sample, sha256 = pair
        if not sha256:
            return ImageRecord(sample, sha256, None, "it cannot be read")
        if sha256 in known and sha256 not in keep:
            return ImageRecord(sample, sha256, known[sha256], None)
        try:
            picture = decode(sample.path.read_bytes(), min_side_px=decode_px)
        except (ImageError, OSError) as error:
            return ImageRecord(sample, sha256, None, str(error))
        if pixel_cache and sha256 in keep:
            pixel_cache.add(sha256, picture)
        return ImageRecord(sample, sha256, known[sha256] if sha256 in known else fingerprint(picture), None)

    records = []
    for result in threaded_map(look, zip(samples, sha256s, strict=True), workers=workers):
        if result.fingerprint is not None and result.sha256 not in known:
            store.add(result.sha256, result.fingerprint)
        records.append(result)
        bar.update()
    bar.close()
    store.flush()
    return records


def fingerprint_context(decode_px: int = MIN_DECODE_PX) -> dict[str, Any]:
    """Everything beside the photo that its fingerprint depends on: a large JPEG is decoded to ``decode_px`` at least."""
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
    """Eight bytes of perceptual hash (imagehash's DCT hash), then a 16 x 16 RGB thumbnail: (776,) uint8.

    For a picture of 32 px at most the eight bytes are those of its pixels' sha256: it looks like no other than itself, and
    sixty thousand of them are compared in seconds.
    """
    small = image.reduce(max(1, min(image.size) // 128))
    if max(image.size) <= EXACT_PX:
        bits = np.frombuffer(hashlib.sha256(image.tobytes()).digest()[:8], dtype=np.uint8)
    else:
        bits = np.packbits(imagehash.phash(small).hash.flatten())
    thumb = small.resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
    return np.concatenate([bits, np.asarray(thumb).reshape(-1)])


def _sha256(path: Path) -> str:
    """The file's sha256, or nothing where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return ""
