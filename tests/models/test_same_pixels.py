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
from finetune.data.image_folder import Sample
from finetune.data.inspection import ImageRecord, PixelCache, fingerprint_context, inspect_images
from finetune.data.synthetic.dataset import draw_image
from finetune.io.array_store import ArrayStore
from finetune.training.data_loaders import UncachedBatches
from models.artifacts.bundle import Bundle
from models.preprocess import Preprocessing, decode

WANTED = Preprocessing(interpolation="bicubic")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """A small photo, and a large one that is decoded at half its size."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "small.jpg", folder / "large.jpg"]
    for path, scale in zip(paths, (1, 8), strict=True):
        drawing = draw_image("cats", rng=random.Random(path.name)).resize((300 * scale, 200 * scale))
        drawing.save(path, quality=90)
    return [Sample(path.name, path, 0, "train") for path in paths]


@pytest.fixture(scope="module")
def wanted(samples: list[Sample]) -> list[NDArray[np.uint8]]:
    pixels = [WANTED.pixels(sample.path.read_bytes()) for sample in samples]
    whole = [WANTED.crop(decode(sample.path.read_bytes())) for sample in samples]
    assert np.array_equal(pixels[0], whole[0])
    assert not np.array_equal(pixels[1], whole[1])  # else the tests below could not fail
    return pixels


def scanned(samples: list[Sample], folder: Path, pixel_cache: PixelCache | None) -> list[ImageRecord]:
    store = ArrayStore(folder, fingerprint_context(), limit_mb=10)
    return inspect_images(samples, store=store, pixel_cache=pixel_cache, select_pixels=set if pixel_cache else None, quiet=True)


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_training_on_cached_features(
    samples: list[Sample], wanted: list[NDArray[np.uint8]], tmp_path: Path, limit_mb: int
) -> None:
    """With and without room to keep the pixels of the first look."""
    pixel_cache = PixelCache(WANTED, limit_mb=limit_mb)
    records = scanned(samples, tmp_path, pixel_cache)
    assert len(pixel_cache.pixels) == (2 if limit_mb else 0)
    for found, pixels in zip(records, wanted, strict=True):
        assert np.array_equal(pixel_cache.pop(found.sha256, found.sample.path), pixels)


def test_training_on_photos_that_are_decoded_in_every_epoch(samples: list[Sample], wanted: list[NDArray[np.uint8]]) -> None:
    class Unchanged:
        def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return pixels

    batches = UncachedBatches(
        samples, preprocessing=WANTED, frozen=Unchanged(), augment=None, batch_size=2, seed=0  # type: ignore[arg-type]
    )  # fmt: skip
    ((features, _),) = batches.ordered()
    assert np.array_equal(features.numpy(), wanted)


def test_prediction(samples: list[Sample], wanted: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.uint8]] = []

    class Engine:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            seen.extend(pixels)
            return [np.full((len(pixels), 2), 0.5, np.float32)] * 2

    monkeypatch.setattr(predict, "OpenVINOEngine", Engine)
    bundle = Bundle(Path("bundle"), {"preprocessing": asdict(WANTED)})
    assert len(list(predict.classify(bundle, [sample.path for sample in samples]))) == 2
    assert np.array_equal(seen, wanted)


def test_a_fingerprint_is_the_same_whether_or_not_pixels_are_wanted(samples: list[Sample], tmp_path: Path) -> None:
    alone = scanned(samples, tmp_path / "a", None)
    along = scanned(samples, tmp_path / "b", PixelCache(WANTED))
    again = scanned(samples, tmp_path / "a", None)
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
        found.append(Sample(name, tmp_path / name, 0, "train"))
    assert len(find_duplicates(scanned(found, tmp_path / "cache", None))) == 1
