"""The photos behind the predictions, from the data folder or kept live: whole, small, or as the model saw them."""

from __future__ import annotations

import logging
import threading

from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.paths import resolve_bundle, thumbnails_dir
from models.errors import BundleError
from models.runtime.openvino_engine import Pixels
from service.db import production
from service.db.ingest import decode_file_name
from service.explain.explainer import Explainer, Explanation
from service.gallery.index import GalleryIndex
from service.http.errors import Problem, problem_from
from service.images.render import render_jpeg
from service.images.source_folder import ImageUnavailableError, SourceFolder
from service.images.thumbnails import ThumbnailCache
from service.images.worker_pool import WorkerPool
from service.inference.decoding import RenderedImage
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings

log = logging.getLogger("service.gallery")
MAX_EXPLAINERS = 4  # of which an explainer is held


class ImageAccess:
    """Pictures by their photo's name and sha256. One for the application."""

    def __init__(self, settings: Settings, gallery: GalleryIndex, decoder: ImageDecoder) -> None:
        self._gallery = gallery
        self._folder = SourceFolder([settings.data_dir] if settings.data_dir else [])
        self._door = decoder
        self._crew = WorkerPool("pictures", threads=1, max_queued=32, timeout_s=30.0)
        self._thumbnails = ThumbnailCache(
            thumbnails_dir(), limit_mb=settings.thumbnail_cache_mb, decoder=self._door, pool=self._crew
        )
        self._explainers: dict[str, Explainer] = {}
        self._lock = threading.Lock()

    def read(self, photo: str, sha256: str) -> bytes:
        """A photo's bytes, of exactly this sha256. Raises Problem where it is missing or was replaced."""
        if photo == production.production_name(sha256):
            with self._gallery.database.read() as connection:
                data_dir = production.load_image(connection, sha256)
            if data_dir is None:
                raise _forgotten(photo)
            return data_dir
        try:
            return self._folder.read(decode_file_name(photo), sha256)
        except ImageUnavailableError as error:
            raise problem_from(error) or error from None

    def find_problem(self, photo: str, sha256: str) -> Problem | None:
        """Why a photo cannot be shown, if it cannot; cheap for one that was looked at before."""
        if photo == production.production_name(sha256):
            with self._gallery.database.read() as connection:
                return None if production.is_saved(connection, sha256) else _forgotten(photo)
        try:
            self._folder.check(decode_file_name(photo), sha256)
        except ImageUnavailableError as error:
            return problem_from(error)
        return None

    def thumbnail(self, photo: str, sha256: str) -> RenderedImage:
        """A small picture. Raises Problem also for one that was kept and whose photo is there no longer."""
        if problem := self.find_problem(photo, sha256):
            raise problem
        return self._thumbnails.get(sha256, lambda: self.read(photo, sha256))

    def original(self, photo: str, sha256: str) -> RenderedImage:
        """Upright, no larger than a screen, without anything but the picture."""
        return self._crew.run(("original", sha256), lambda: render_jpeg(self.read(photo, sha256), decoder=self._door))

    def crop(self, version: str, photo: str, sha256: str) -> Pixels:
        """(H, W, C) uint8 as the model of that version saw the photo."""
        preprocessing = self._bundle(version).preprocessing
        return self._crew.run(
            ("crop", preprocessing.sha256(), sha256),
            lambda: self._door.preprocess(self.read(photo, sha256), preprocessing).pixels,
        )

    def explain(self, version: str, photo: str, sha256: str, label: str) -> Explanation:
        """Where the photo speaks for a class. Raises Problem where the model's bundle is not on this machine."""
        bundle = self._bundle(version)  # an explainer reads it again after it was idle
        with self._lock:
            if version not in self._explainers:
                if len(self._explainers) >= MAX_EXPLAINERS:
                    self._explainers.pop(next(iter(self._explainers))).close()
                self._explainers[version] = Explainer(bundle)
            explainer = self._explainers[version]
        return explainer.explain(sha256, label, lambda: self.crop(version, photo, sha256))

    def _bundle(self, version: str) -> Bundle:
        path = self._gallery.bundle_path(version)
        try:
            if path is not None:
                return open_bundle(resolve_bundle(path), files=())
        except BundleError as error:
            raise _bundle_missing(version, error) from None
        raise _bundle_missing(version)


def _bundle_missing(version: str, error: BundleError | None = None) -> Problem:
    """The error for a bundle that was never here, or was moved or changed since the start; the log says which."""
    if error:
        log.warning("a bundle of the gallery cannot be opened", extra={"version": version, "reason": str(error)})
    return Problem("not_found", f"The bundle {version} is not on this machine; name its folder in EVALUATIONS.")


def _forgotten(photo: str) -> Problem:
    return Problem("image_missing", f"The photo {photo} is no longer kept; MAX_SAVED and RETENTION_DAYS say how long.")
