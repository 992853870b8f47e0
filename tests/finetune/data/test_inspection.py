"""The inspection of images: what is stored under a hash was computed from the file with that hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.data import inspection
from finetune.data.image_folder import Sample
from finetune.data.inspection import ChangedImageError, fingerprint, fingerprint_context, inspect_images, read_pixels
from finetune.io.array_store import ArrayStore
from models.artifacts.atomic_io import sha256_of
from models.preprocess import Preprocessing, decode
from tests.helpers.tiny_network import paint

PREPROCESSING = Preprocessing()


class Collector:
    """Collects the pixels of every image."""

    def __init__(self) -> None:
        self.pixels: dict[str, NDArray[np.uint8]] = {}

    def needs(self, sha256: str) -> bool:
        return True

    def add(self, sha256: str, pixels: NDArray[np.uint8]) -> None:
        self.pixels[sha256] = pixels

    def finish(self) -> None: ...
    def flush(self) -> None: ...


def test_a_file_that_is_replaced_during_the_inspection_is_recorded_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = paint(tmp_path / "red.jpg", (250, 30, 30), seed=1)
    other = paint(tmp_path / "blue.jpg", (30, 30, 250), seed=2).read_bytes()
    sha256, original = sha256_of(file), file.read_bytes()
    read = inspection.read_image_file

    def read_then_replace(path: Path) -> bytes:
        data = read(path)
        path.write_bytes(other)
        return data

    monkeypatch.setattr(inspection, "read_image_file", read_then_replace)
    store = ArrayStore(tmp_path / "cache", fingerprint_context(PREPROCESSING.decode_px), limit_mb=10)
    sample, collector = Sample("red.jpg", file, 0, "train"), Collector()
    options = {"store": store, "preprocessing": PREPROCESSING, "consumer": collector, "workers": 1, "quiet": True}
    (record,) = inspect_images([sample], **options)  # type: ignore[arg-type]
    assert (record.sha256, record.error) == (sha256, None)
    expected = fingerprint(decode(original, min_side_px=PREPROCESSING.decode_px))
    assert np.array_equal(store.load([sha256])[sha256], expected)
    assert np.array_equal(collector.pixels[sha256], PREPROCESSING.pixels(original))


def test_an_inspected_image_is_only_read_again_if_it_has_not_changed(tmp_path: Path) -> None:
    file = paint(tmp_path / "red.jpg", (250, 30, 30), seed=1)
    expected = PREPROCESSING.pixels(file.read_bytes())
    store = ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10)
    (record,) = inspect_images([Sample("red.jpg", file, 0, "train")], store=store, workers=1, quiet=True)
    assert np.array_equal(read_pixels(record, PREPROCESSING), expected)
    paint(file, (30, 30, 250), seed=2)
    with pytest.raises(ChangedImageError, match=r"red\.jpg has changed since it was inspected\. Restore it\."):
        read_pixels(record, PREPROCESSING)
    file.unlink()
    with pytest.raises(
        ChangedImageError, match=r"red\.jpg can no longer be read \(No such file or directory\)\. Put it back\."
    ):
        read_pixels(record, PREPROCESSING)
