"""Thumbnails: made once of each photo by a crew of low priority, and kept."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from models.preprocess import IMAGE_FORMATS
from service.images.disk_cache import DiskCache
from service.images.render import render_jpeg
from service.images.worker_pool import WorkerPool
from service.inference.decoding import RenderedImage
from service.inference.image_decoder import ImageDecoder

THUMBNAIL_MAX_PX = 320
QUALITY = 80  # JPEG: WebP of the same fidelity is a sixth smaller, and takes ten times as long to make
CACHE_PREFIX = f"thumbnail 1, {THUMBNAIL_MAX_PX} px, JPEG {QUALITY}"  # to be renamed when a thumbnail would look otherwise
JPEG_END = b"\xff\xd9"
MIB = 1 << 20


class ThumbnailCache:
    """Thumbnails by their photos' sha256, from several threads at once. A photo that is asked for by many is decoded once.

    Up to ``limit_mb`` MiB are kept in ``folder``; where that is None or the limit 0, a few in memory.
    """

    def __init__(self, folder: Path | None, *, limit_mb: int, decoder: ImageDecoder, pool: WorkerPool) -> None:
        self._door, self._crew = decoder, pool
        self._kept = DiskCache(folder, limit_bytes=limit_mb * MIB)

    def get(self, sha256: str, read: Callable[[], bytes]) -> RenderedImage:
        """The thumbnail, at most THUMBNAIL_MAX_PX on its longer side; ``read`` gives the photo's bytes where it has to be made.

        Raises what ``read`` raises, and Problem: for a photo that cannot be decoded, where too many wait, or too long.
        """
        return self._find(sha256) or self._crew.run(
            (CACHE_PREFIX, sha256), lambda: self._find(sha256) or self._make(sha256, read)
        )

    def _find(self, sha256: str) -> RenderedImage | None:
        data = self._kept.get(_name(sha256))
        if data is None:
            return None
        # A disk may give back anything; a file that is whole has both ends.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS[:1]) as file:
            if data.endswith(JPEG_END):
                return RenderedImage(data, *file.size)
        self._kept.remove(_name(sha256))
        return None

    def _make(self, sha256: str, read: Callable[[], bytes]) -> RenderedImage:
        made = render_jpeg(read(), decoder=self._door, max_side_px=THUMBNAIL_MAX_PX, quality=QUALITY)
        self._kept.put(_name(sha256), made.data)
        return made


def _name(sha256: str) -> str:
    return f"{CACHE_PREFIX}: {sha256}"
