"""The inspection of images: what is stored under a hash was computed from the file with that hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data import inspection
from finetune.data.image_folder import Sample
from finetune.data.inspection import ChangedImageError, PixelCache, fingerprint_context, inspect_images
from finetune.io.array_store import ArrayStore
from models.artifacts.atomic_io import sha256_of
from models.preprocess import Preprocessing
from tests.helpers.tiny_network import paint


def test_a_file_that_is_replaced_after_hashing_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = paint(tmp_path / "red.jpg", (250, 30, 30), seed=1)
    other = paint(tmp_path / "blue.jpg", (30, 30, 250), seed=2)
    sha256, hash_file = sha256_of(file), inspection._sha256

    def hash_then_replace(path: Path) -> str:
        result = hash_file(path)
        path.write_bytes(other.read_bytes())
        return result

    monkeypatch.setattr(inspection, "_sha256", hash_then_replace)
    store = ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10)
    pixel_cache = PixelCache(Preprocessing())
    sample = Sample("red.jpg", file, 0, "train")
    (record,) = inspect_images([sample], store=store, pixel_cache=pixel_cache, select_pixels=set, workers=1, quiet=True)
    assert record.error == "the file changed while it was read"
    assert store.load([sha256]) == {}
    assert pixel_cache.pixels == {}


def test_pixels_are_only_decoded_from_the_inspected_content(tmp_path: Path) -> None:
    file = paint(tmp_path / "red.jpg", (250, 30, 30), seed=1)
    pixel_cache, sha256 = PixelCache(Preprocessing()), sha256_of(file)
    expected = Preprocessing().pixels(file.read_bytes())
    assert np.array_equal(pixel_cache.pop(sha256, file), expected)
    paint(file, (30, 30, 250), seed=2)
    with pytest.raises(ChangedImageError, match=r"red\.jpg has changed since it was inspected\. Restore it\."):
        pixel_cache.pop(sha256, file)
