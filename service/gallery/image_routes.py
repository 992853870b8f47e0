"""The addresses of pictures. Each is named by its photo's sha256, so that a browser may keep it for ever."""

from __future__ import annotations

import hashlib

from flask import Blueprint, Response, request

from service.context import gallery, image_access
from service.explain.heatmap import legend, overlay
from service.images.render import encode_png
from service.web.layout import ONE_YEAR_S

bp = Blueprint("images", __name__, url_prefix="/gallery/images")


@bp.get("/<sha256>/thumbnail.jpg")
def thumbnail(sha256: str) -> Response:
    return _forever(image_access().thumbnail(_photo(), sha256).data, "image/jpeg")


@bp.get("/<sha256>/original.jpg")
def original(sha256: str) -> Response:
    return _forever(image_access().original(_photo(), sha256).data, "image/jpeg")


@bp.get("/<sha256>/crop.png")
def crop(sha256: str) -> Response:
    """As the model saw it."""
    return _forever(encode_png(image_access().crop(_version(), _photo(), sha256)), "image/png")


@bp.get("/<sha256>/heatmap.png")
def heatmap(sha256: str) -> Response:
    """The crop, with the places bright that speak for ``class``."""
    active_version, photo = _version(), _photo()
    explanation = image_access().explain(active_version, photo, sha256, request.args.get("class", ""))
    pixels = image_access().crop(active_version, photo, sha256)
    return _forever(overlay(pixels, explanation.heatmap(pixels.shape[0])), "image/png")


@bp.get("/legend.png")
def legend_png() -> Response:
    """The colours of the attention, from none to the most."""
    return _forever(legend(), "image/png")


def _photo() -> str:
    return request.args.get("photo", "")


def _version() -> str:
    return request.args.get("model") or gallery().active_version or ""


def _forever(data: bytes, media_type: str) -> Response:
    answer = Response(data, mimetype=media_type)
    answer.headers["Cache-Control"] = f"private, max-age={ONE_YEAR_S}, immutable"
    answer.set_etag(hashlib.sha256(request.full_path.encode("utf-8", "surrogateescape")).hexdigest()[:32])
    return answer.make_conditional(request)  # type: ignore[return-value]
