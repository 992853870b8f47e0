"""Serve the gallery's images: originals, thumbnails, model inputs and heat maps of evaluated and production photos.

Each URL has the sha256 of its photo, so that browsers may cache it without end.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from flask import Blueprint, Response, request

from models.artifacts.bundle import Bundle, open_bundle
from models.artifacts.paths import resolve_bundle, thumbnails_dir
from models.errors import UserError
from models.runtime.openvino_engine import Pixels
from service.context import gallery, image_access
from service.db import production
from service.db.errors import RecordNotFoundError
from service.db.text import decode_file_name
from service.explain.explainer import Explainer, Explanation
from service.explain.heatmap import legend, overlay
from service.gallery.index import GalleryIndex
from service.http.errors import Problem, problem_from
from service.images.render import encode_png
from service.images.source_folder import ImageMissingError, ImageUnavailableError, SourceFolder
from service.images.thumbnails import ThumbnailCache
from service.images.worker_pool import WorkerPool
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings
from service.web.layout import ONE_YEAR_S

MAX_EXPLAINERS = 4
DISPLAY_MAX_PX = 2048
DISPLAY_QUALITY = 90
T = TypeVar("T")

log = logging.getLogger("service.gallery")
bp = Blueprint("images", __name__, url_prefix="/gallery/images")


class ImageAccess:
    """Images by the name and sha256 of their photo. There is one for the application."""

    def __init__(self, settings: Settings, gallery: GalleryIndex, decoder: ImageDecoder) -> None:
        self._gallery = gallery
        self._source_folder = SourceFolder(gallery.data_folders())
        self._decoder = decoder
        self._pool = WorkerPool("images", threads=1, max_queued=32, timeout_s=30.0)
        self._thumbnails = ThumbnailCache(
            thumbnails_dir(), limit_mb=settings.thumbnail_cache_mb, render=decoder.render, pool=self._pool
        )
        self._explainers: dict[str, Explainer] = {}
        self._lock = threading.Lock()

    def read(self, photo: str, sha256: str) -> bytes:
        """Read a photo.

        Raises:
            ImageUnavailableError: The photo is missing or was replaced.
        """
        if photo == production.production_name(sha256):
            with self._gallery.database.read() as connection:
                data = production.load_image(connection, sha256)
            if data is None:
                raise _deleted(photo)
            return data
        return self._find(lambda folder: folder.read(decode_file_name(photo), sha256))

    def check(self, photo: str, sha256: str) -> None:
        """Raise what ``read`` would raise, without reading a photo that was read before."""
        if photo == production.production_name(sha256):
            with self._gallery.database.read() as connection:
                if not production.is_saved(connection, sha256):
                    raise _deleted(photo)
        else:
            self._find(lambda folder: folder.check(decode_file_name(photo), sha256))

    def find_problem(self, photo: str, sha256: str) -> Problem | None:
        """Return why a photo cannot be shown, or None."""
        try:
            self.check(photo, sha256)
        except ImageUnavailableError as error:
            return problem_from(error)
        return None

    def thumbnail(self, photo: str, sha256: str) -> bytes:
        """Return a JPEG thumbnail. Raises ImageUnavailableError if the photo is gone, even if its thumbnail is cached."""
        self.check(photo, sha256)
        return self._thumbnails.get(sha256, lambda: self.read(photo, sha256))

    def thumbnail_of(self, data: bytes) -> bytes:
        """Return a JPEG thumbnail of a file that is not one of the gallery's photos."""
        return self._thumbnails.get(hashlib.sha256(data).hexdigest(), lambda: data)

    def display(self, data: bytes) -> bytes:
        """Return a JPEG like ``original`` of a file that is not one of the gallery's photos."""
        key = ("original", hashlib.sha256(data).hexdigest())
        return self._pool.run(key, lambda: self._decoder.render(data, max_side_px=DISPLAY_MAX_PX, quality=DISPLAY_QUALITY))

    def original(self, photo: str, sha256: str) -> bytes:
        """Return a JPEG of the upright photo, at most DISPLAY_MAX_PX on its longer side, without metadata."""
        return self._pool.run(
            ("original", sha256),
            lambda: self._decoder.render(self.read(photo, sha256), max_side_px=DISPLAY_MAX_PX, quality=DISPLAY_QUALITY),
        )

    def crop(self, version: str, photo: str, sha256: str) -> Pixels:
        """Return the input of the model of this version for a photo, (H, W, C) uint8."""
        preprocessing = self._bundle(version).preprocessing
        return self._pool.run(
            ("crop", preprocessing.sha256(), sha256),
            lambda: self._decoder.preprocess(self.read(photo, sha256), preprocessing).pixels,
        )

    def explain(self, version: str, photo: str, sha256: str, label: str) -> Explanation:
        """Explain the prediction of a model for a photo and a class (see ``Explainer.explain``).

        Raises:
            RecordNotFoundError: The bundle of the model is not on this machine.
        """
        bundle = self._bundle(version)
        with self._lock:
            if version not in self._explainers:
                if len(self._explainers) >= MAX_EXPLAINERS:
                    self._explainers.pop(next(iter(self._explainers))).close()
                self._explainers[version] = Explainer(bundle)
            explainer = self._explainers[version]
        return explainer.explain(sha256, label, lambda: self.crop(version, photo, sha256))

    def _find(self, use: Callable[[SourceFolder], T]) -> T:
        """Use the data folders. If a photo is in none of them, list them again: the studio adds some at any time."""
        try:
            return use(self._source_folder)
        except ImageUnavailableError:
            folders = self._gallery.data_folders()
            if folders == self._source_folder.roots:
                raise
            self._source_folder.roots = folders
            return use(self._source_folder)

    def _bundle(self, version: str) -> Bundle:
        path = self._gallery.bundle_path(version)
        if path is None:
            raise RecordNotFoundError(f"The bundle {version} is not on this machine. Add its folder to EVALUATIONS.")
        try:
            return open_bundle(resolve_bundle(path), files=())
        except UserError as error:
            log.warning("a bundle of the gallery cannot be opened", extra={"version": version, "reason": str(error)})
            raise RecordNotFoundError(f"The bundle {version} was moved or damaged. Copy it to its folder again.") from None


@bp.get("/<sha256>/thumbnail.jpg")
def thumbnail(sha256: str) -> Response:
    return _cacheable(image_access().thumbnail(_photo(), sha256), "image/jpeg")


@bp.get("/<sha256>/original.jpg")
def original(sha256: str) -> Response:
    return _cacheable(image_access().original(_photo(), sha256), "image/jpeg")


@bp.get("/<sha256>/crop.png")
def crop(sha256: str) -> Response:
    """The input of the model."""
    return _cacheable(encode_png(image_access().crop(_version(), _photo(), sha256)), "image/png")


@bp.get("/<sha256>/heatmap.png")
def heatmap(sha256: str) -> Response:
    """The input of the model with the regions that support ``class``."""
    version, photo = _version(), _photo()
    explanation = image_access().explain(version, photo, sha256, request.args.get("class", ""))
    pixels = image_access().crop(version, photo, sha256)
    return _cacheable(overlay(pixels, explanation.heatmap(pixels.shape[0])), "image/png")


@bp.get("/legend.png")
def legend_png() -> Response:
    """The colors of a heat map."""
    return _cacheable(legend(), "image/png")


def _photo() -> str:
    return request.args.get("photo", "")


def _version() -> str:
    return request.args.get("model") or gallery().active_version or ""


def _cacheable(data: bytes, media_type: str) -> Response:
    response = Response(data, mimetype=media_type)
    response.headers["Cache-Control"] = f"private, max-age={ONE_YEAR_S}, immutable"
    response.set_etag(hashlib.sha256(request.full_path.encode("utf-8", "surrogateescape")).hexdigest()[:32])
    return response.make_conditional(request)  # type: ignore[return-value]


def _deleted(photo: str) -> ImageMissingError:
    return ImageMissingError(f"The photo {photo} is no longer saved. MAX_SAVED, MAX_SAVED_MB and RETENTION_DAYS limit what is.")
