"""Create thumbnails once per photo and cache them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from models.preprocess import IMAGE_FORMATS
from service.images.disk_cache import DiskCache
from service.images.worker_pool import WorkerPool

THUMBNAIL_MAX_PX = 320
QUALITY = 80  # JPEG: WebP of the same fidelity is a sixth smaller and takes ten times as long to encode
CACHE_PREFIX = f"thumbnail 1, {THUMBNAIL_MAX_PX} px, JPEG {QUALITY}"  # change it when thumbnails change
JPEG_END = b"\xff\xd9"
MIB = 1 << 20
Render = Callable[..., bytes]


class ThumbnailCache:
    """JPEG thumbnails by the sha256 of their photos, for several threads at once."""

    def __init__(self, folder: Path | None, *, limit_mb: int, render: Render, pool: WorkerPool) -> None:
        """Create the cache.

        Args:
            folder: Where thumbnails are stored. None keeps some in memory.
            limit_mb: The size limit of the folder in MiB; 0 keeps some in memory.
            render: ``render(data, max_side_px=..., quality=...)`` makes a JPEG of a photo.
            pool: The threads that render.
        """
        self._render, self._pool = render, pool
        self._cache = DiskCache(folder, limit_bytes=limit_mb * MIB)

    def get(self, sha256: str, read: Callable[[], bytes]) -> bytes:
        """Return the thumbnail of a photo, at most THUMBNAIL_MAX_PX on its longer side.

        Args:
            sha256: The photo.
            read: Reads the photo's bytes if the thumbnail is not cached.

        Raises:
            UserError: The photo cannot be read or decoded, or the pool is busy.
        """
        key = f"{CACHE_PREFIX}: {sha256}"
        return self._find(key) or self._pool.run(key, lambda: self._find(key) or self._create(key, read))

    def _find(self, key: str) -> bytes | None:
        data = self._cache.get(key)
        if data is None:
            return None
        # A disk may return anything. A complete file has a valid start and end.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS[:1]):
            if data.endswith(JPEG_END):
                return data
        self._cache.remove(key)
        return None

    def _create(self, key: str, read: Callable[[], bytes]) -> bytes:
        data = self._render(read(), max_side_px=THUMBNAIL_MAX_PX, quality=QUALITY)
        self._cache.put(key, data)
        return data
