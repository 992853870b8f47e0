"""Training, evaluation and prediction preprocess an image to identical pixels."""

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

PREPROCESSING = Preprocessing(interpolation="bicubic")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """A small image, and a large one that is decoded at half of its size."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "small.jpg", folder / "large.jpg"]
    for path, scale in zip(paths, (1, 8), strict=True):
        drawing = draw_image("cats", rng=random.Random(path.name)).resize((300 * scale, 200 * scale))
        drawing.save(path, quality=90)
    return [Sample(path.name, path, 0, "train") for path in paths]


@pytest.fixture(scope="module")
def expected(samples: list[Sample]) -> list[NDArray[np.uint8]]:
    pixels = [PREPROCESSING.pixels(sample.path.read_bytes()) for sample in samples]
    full_size = [PREPROCESSING.crop(decode(sample.path.read_bytes())) for sample in samples]
    assert np.array_equal(pixels[0], full_size[0])
    assert not np.array_equal(pixels[1], full_size[1])  # the tests below depend on this difference
    return pixels


def scanned(samples: list[Sample], folder: Path, pixel_cache: PixelCache | None) -> list[ImageRecord]:
    store = ArrayStore(folder, fingerprint_context(), limit_mb=10)
    return inspect_images(samples, store=store, pixel_cache=pixel_cache, select_pixels=set if pixel_cache else None, quiet=True)


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_training_on_cached_features(
    samples: list[Sample], expected: list[NDArray[np.uint8]], tmp_path: Path, limit_mb: int
) -> None:
    """With and without memory to cache the pixels."""
    pixel_cache = PixelCache(PREPROCESSING, limit_mb=limit_mb)
    records = scanned(samples, tmp_path, pixel_cache)
    assert len(pixel_cache.pixels) == (2 if limit_mb else 0)
    for record, pixels in zip(records, expected, strict=True):
        assert np.array_equal(pixel_cache.pop(record.sha256, record.sample.path), pixels)


def test_training_on_images_that_are_decoded_in_every_epoch(
    samples: list[Sample], expected: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    class Identity:
        def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return pixels

    records = scanned(samples, tmp_path, None)
    batches = UncachedBatches(
        records, preprocessing=PREPROCESSING, frozen=Identity(), augment=None, batch_size=2, seed=0  # type: ignore[arg-type]
    )  # fmt: skip
    ((features, _),) = batches.ordered()
    assert np.array_equal(features.numpy(), expected)


def test_prediction(samples: list[Sample], expected: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[NDArray[np.uint8]] = []

    class Engine:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            inputs.extend(pixels)
            return [np.full((len(pixels), 2), 0.5, np.float32)] * 2

    monkeypatch.setattr(predict, "OpenVINOEngine", Engine)
    bundle = Bundle(Path("bundle"), {"preprocessing": asdict(PREPROCESSING)})
    assert len(list(predict.classify(bundle, [sample.path for sample in samples]))) == 2
    assert np.array_equal(inputs, expected)


def test_fingerprint_does_not_depend_on_pixel_caching(samples: list[Sample], tmp_path: Path) -> None:
    without_pixels = scanned(samples, tmp_path / "a", None)
    with_pixels = scanned(samples, tmp_path / "b", PixelCache(PREPROCESSING))
    again = scanned(samples, tmp_path / "a", None)
    for one, two, three in zip(without_pixels, with_pixels, again, strict=True):
        assert one.fingerprint is not None
        assert np.array_equal(one.fingerprint, two.fingerprint)
        assert np.array_equal(one.fingerprint, three.fingerprint)


def test_fingerprint_context_depends_on_the_decode_size() -> None:
    assert fingerprint_context() == fingerprint_context(PREPROCESSING.decode_px)
    assert fingerprint_context() != fingerprint_context(Preprocessing(resize_px=384).decode_px)


def test_large_and_small_versions_of_an_image_are_duplicates(tmp_path: Path) -> None:
    drawing = draw_image("dogs", rng=random.Random(5)).resize((2400, 1600), Image.Resampling.BICUBIC)
    samples = []
    for name, image in {"large.jpg": drawing, "small.jpg": drawing.resize((600, 400))}.items():
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        (tmp_path / name).write_bytes(file.getvalue())
        samples.append(Sample(name, tmp_path / name, 0, "train"))
    assert len(find_duplicates(scanned(samples, tmp_path / "cache", None))) == 1
