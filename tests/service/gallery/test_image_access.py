"""Images of a model whose bundle is no longer there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from service.gallery.image_access import ImageAccess
from service.gallery.index import GalleryIndex
from service.http.errors import Problem
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings


@pytest.mark.parametrize("is_known", [True, False])
def test_a_bundle_that_is_gone_is_not_found(tmp_path: Path, is_known: bool) -> None:
    """Before, it was an internal error if the bundle was removed after the start."""
    gallery = cast("GalleryIndex", SimpleNamespace(bundle_path=lambda version: tmp_path / "gone" if is_known else None))
    images = ImageAccess(Settings(thumbnail_cache_mb=0), gallery, ImageDecoder.of(Settings()))
    for look in (
        lambda: images.crop("v1", "cats/1.jpg", "0" * 64),
        lambda: images.explain("v1", "cats/1.jpg", "0" * 64, "cats"),
    ):
        with pytest.raises(Problem, match="The bundle v1 is not on this machine") as caught:
            look()
        assert caught.value.code == "not_found"
