"""Images of a model whose bundle was deleted, and of data folders that are added while the service runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import open_bundle
from service.db.errors import RecordNotFoundError
from service.gallery.image_routes import ImageAccess
from service.gallery.index import GalleryIndex
from service.images.source_folder import ImageReplacedError
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings


@pytest.mark.parametrize("is_known", [True, False])
def test_a_bundle_that_is_gone_is_not_found(tmp_path: Path, is_known: bool) -> None:
    gallery = cast(
        "GalleryIndex", SimpleNamespace(bundle_path=lambda version: tmp_path / "gone" if is_known else None, data_folders=list)
    )
    images = ImageAccess(Settings(thumbnail_cache_mb=0), gallery, ImageDecoder.of(Settings()))
    for read in (
        lambda: images.crop("v1", "cats/1.jpg", "0" * 64),
        lambda: images.explain("v1", "cats/1.jpg", "0" * 64, "cats"),
    ):
        expected = "was moved or damaged. Copy it to its folder again." if is_known else "is not on this machine."
        with pytest.raises(RecordNotFoundError, match=f"The bundle v1 {expected}"):
            read()


def test_a_bundle_deleted_after_the_first_explanation_is_not_found(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    """Its engine is unloaded when it is idle and compiled again from the bundle's folder."""
    bundle, version = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle")), open_bundle(tiny_bundle.path).version
    photo = tiny_bundle.photos / "red" / "red.000.jpg"
    gallery = cast(
        "GalleryIndex", SimpleNamespace(bundle_path=lambda version: bundle, data_folders=lambda: [tiny_bundle.photos])
    )
    images = ImageAccess(
        Settings(data_dir=tiny_bundle.photos, thumbnail_cache_mb=0), gallery, ImageDecoder.of(Settings(decode_timeout_s=300))
    )
    arguments = (version, "red/red.000.jpg", sha256_of(photo))
    assert images.explain(*arguments, "red").label == "red"
    images._explainers[version]._release()
    bundle.rename(tmp_path / "moved")
    with pytest.raises(RecordNotFoundError, match=f"The bundle {version} was moved or damaged."):
        images.explain(*arguments, "blue")


def test_the_data_folders_are_listed_again_only_for_a_photo_that_is_in_none_of_them(tmp_path: Path) -> None:
    folders, listings = [tmp_path / "first"], []

    def data_folders() -> list[Path]:
        listings.append(list(folders))
        return list(folders)

    gallery = cast("GalleryIndex", SimpleNamespace(data_folders=data_folders))
    images = ImageAccess(Settings(thumbnail_cache_mb=0), gallery, ImageDecoder.of(Settings()))
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(folder.encode())
    first, second = (sha256_of(tmp_path / folder / "1.jpg") for folder in ("first", "second"))
    for _ in range(3):
        assert images.read("1.jpg", first) == b"first"
    assert len(listings) == 1
    with pytest.raises(ImageReplacedError):
        images.read("1.jpg", second)
    folders.append(tmp_path / "second")
    assert images.read("1.jpg", second) == b"second"
    images.check("1.jpg", second)
    assert len(listings) == 3
