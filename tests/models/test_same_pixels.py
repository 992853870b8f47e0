"""A photo gives the same pixels, to the bit, wherever it is looked at: in training, in evaluation and in prediction."""

from __future__ import annotations

import io
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune.batch_inference import predict
from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Photo
from finetune.data.inspection import PixelStash, Scan, fingerprint_context, scan
from finetune.data.synthetic.dataset import draw_image
from finetune.io.array_store import ShardStore
from finetune.training.data_loaders import LiveBatches
from models.artifacts.bundle import Bundle
from models.preprocess import Preprocessing, decode

WANTED = Preprocessing(interpolation="bicubic")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Photo]:
    """A small photo, and a large one that is decoded at half its size."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "small.jpg", folder / "large.jpg"]
    for path, scale in zip(paths, (1, 8), strict=True):
        drawing = draw_image("cats", rng=random.Random(path.name)).resize((300 * scale, 200 * scale))
        drawing.save(path, quality=90)
    return [Photo(path.name, path, 0, "train") for path in paths]


@pytest.fixture(scope="module")
def wanted(photos: list[Photo]) -> list[NDArray[np.uint8]]:
    pixels = [WANTED.pixels(photo.path.read_bytes()) for photo in photos]
    whole = [WANTED.crop(decode(photo.path.read_bytes())) for photo in photos]
    assert np.array_equal(pixels[0], whole[0])
    assert not np.array_equal(pixels[1], whole[1])  # else the tests below could not fail
    return pixels


def scanned(photos: list[Photo], folder: Path, stash: PixelStash | None) -> list[Scan]:
    store = ShardStore(folder, fingerprint_context(), limit_mb=10)
    return scan(photos, store=store, stash=stash, wanted=set if stash else None, quiet=True)


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_training_on_cached_features(
    photos: list[Photo], wanted: list[NDArray[np.uint8]], tmp_path: Path, limit_mb: int
) -> None:
    """With and without room to keep the pixels of the first look."""
    stash = PixelStash(WANTED, limit_mb=limit_mb)
    scans = scanned(photos, tmp_path, stash)
    assert len(stash.pixels) == (2 if limit_mb else 0)
    for found, pixels in zip(scans, wanted, strict=True):
        assert np.array_equal(stash.take(found.sha256, found.photo.path), pixels)


def test_training_on_photos_that_are_decoded_in_every_epoch(photos: list[Photo], wanted: list[NDArray[np.uint8]]) -> None:
    class Unchanged:
        def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return pixels

    batches = LiveBatches(
        photos, preprocessing=WANTED, frozen=Unchanged(), augment=None, batch_size=2, seed=0  # type: ignore[arg-type]
    )  # fmt: skip
    ((features, _),) = batches.ordered()
    assert np.array_equal(features.numpy(), wanted)


def test_prediction(photos: list[Photo], wanted: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.uint8]] = []

    class Engine:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            seen.extend(pixels)
            return [np.full((len(pixels), 2), 0.5, np.float32)] * 2

    monkeypatch.setattr(predict, "OpenVINOEngine", Engine)
    bundle = Bundle(Path("bundle"), {"preprocessing": asdict(WANTED)})
    assert len(list(predict.classify(bundle, [photo.path for photo in photos]))) == 2
    assert np.array_equal(seen, wanted)


def test_a_fingerprint_is_the_same_whether_or_not_pixels_are_wanted(photos: list[Photo], tmp_path: Path) -> None:
    alone = scanned(photos, tmp_path / "a", None)
    along = scanned(photos, tmp_path / "b", PixelStash(WANTED))
    again = scanned(photos, tmp_path / "a", None)
    for one, two, three in zip(alone, along, again, strict=True):
        assert one.fingerprint is not None
        assert np.array_equal(one.fingerprint, two.fingerprint)
        assert np.array_equal(one.fingerprint, three.fingerprint)


def test_fingerprints_of_photos_decoded_to_another_size_are_kept_apart() -> None:
    assert fingerprint_context() == fingerprint_context(WANTED.decode_px)
    assert fingerprint_context() != fingerprint_context(Preprocessing(resize_px=384).decode_px)


def test_the_same_picture_large_and_small_is_found_to_be_one(tmp_path: Path) -> None:
    drawing = draw_image("dogs", rng=random.Random(5)).resize((2400, 1600), Image.Resampling.BICUBIC)
    found = []
    for name, picture in {"large.jpg": drawing, "small.jpg": drawing.resize((600, 400))}.items():
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        (tmp_path / name).write_bytes(file.getvalue())
        found.append(Photo(name, tmp_path / name, 0, "train"))
    assert len(find_duplicates(scanned(found, tmp_path / "cache", None))) == 1
