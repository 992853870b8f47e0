"""Thumbnails: made once of each photo by a crew of low priority, and kept."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from models.preprocess import IMAGE_FORMATS
from service.images.disk_cache import Blobs
from service.images.render import Picture, make_picture
from service.images.worker_pool import Crew
from service.inference.image_decoder import ImageDecoder

LONGEST_PX = 320
QUALITY = 80  # JPEG: WebP of the same fidelity is a sixth smaller, and takes ten times as long to make
RECIPE = f"thumbnail 1, {LONGEST_PX} px, JPEG {QUALITY}"  # to be renamed when a thumbnail would look otherwise
END = b"\xff\xd9"
MIB = 1 << 20


class Thumbnails:
    """Thumbnails by their photos' sha256, from several threads at once. A photo that is asked for by many is decoded once.

    Up to ``limit_mb`` MiB are kept in ``folder``; where that is None or the limit 0, a few in memory.
    """

    def __init__(self, folder: Path | None, *, limit_mb: int, decoder: ImageDecoder, crew: Crew) -> None:
        self._door, self._crew = decoder, crew
        self._kept = Blobs(folder, limit_bytes=limit_mb * MIB)

    def get(self, sha256: str, read: Callable[[], bytes]) -> Picture:
        """The thumbnail, at most LONGEST_PX on its longer side; ``read`` gives the photo's bytes where it has to be made.

        Raises what ``read`` raises, and Problem: for a photo that cannot be decoded, where too many wait, or too long.
        """
        return self._find(sha256) or self._crew.do((RECIPE, sha256), lambda: self._find(sha256) or self._make(sha256, read))

    def _find(self, sha256: str) -> Picture | None:
        data = self._kept.get(_name(sha256))
        if data is None:
            return None
        # A disk may give back anything; a file that is whole has both ends.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS[:1]) as file:
            if data.endswith(END):
                return Picture(data, *file.size)
        self._kept.drop(_name(sha256))
        return None

    def _make(self, sha256: str, read: Callable[[], bytes]) -> Picture:
        made = make_picture(read(), decoder=self._door, longest_px=LONGEST_PX, quality=QUALITY)
        self._kept.put(_name(sha256), made.data)
        return made


def _name(sha256: str) -> str:
    return f"{RECIPE}: {sha256}"
