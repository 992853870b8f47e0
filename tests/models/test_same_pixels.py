"""Training, evaluation and prediction preprocess an image to identical pixels."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune.batch_inference import predict
from finetune.data import inspection
from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Sample
from finetune.data.inspection import ChangedImageError, ImageRecord, fingerprint_context, inspect_images, read_pixels
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


class Collector:
    """Collects the pixels of an inspection. ``cached`` are images that it does not need."""

    def __init__(self, *cached: str) -> None:
        self.pixels: dict[str, NDArray[np.uint8]] = {}
        self.cached = cached
        self.calls: list[str] = []

    def needs(self, sha256: str) -> bool:
        return sha256 not in self.cached

    def add(self, sha256: str, pixels: NDArray[np.uint8]) -> None:
        self.pixels[sha256] = pixels

    def finish(self) -> None:
        self.calls.append("finish")

    def flush(self) -> None:
        self.calls.append("flush")


def inspected(samples: list[Sample], folder: Path, collector: Collector | None = None) -> list[ImageRecord]:
    store = ArrayStore(folder, fingerprint_context(), limit_mb=10)
    return inspect_images(samples, store=store, preprocessing=PREPROCESSING, consumer=collector, quiet=True)


def test_training_on_cached_features(samples: list[Sample], expected: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    """While the images are inspected, also with cached fingerprints, and when an image is read again."""
    for _ in range(2):
        collector = Collector()
        records = inspected(samples, tmp_path, collector)
        assert collector.calls == ["finish", "flush"]
        for record, pixels in zip(records, expected, strict=True):
            assert np.array_equal(collector.pixels[record.sha256], pixels)
            assert np.array_equal(read_pixels(record, PREPROCESSING), pixels)
    collector = Collector(records[0].sha256)
    inspected(samples, tmp_path, collector)
    assert list(collector.pixels) == [records[1].sha256]


def test_everything_about_an_image_belongs_to_one_read_of_its_file(
    samples: list[Sample], expected: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are replaced while they are inspected. What goes into a cache must belong to the sha256 that it is stored under."""
    copies = [replace(sample, path=Path(shutil.copy(sample.path, tmp_path))) for sample in samples]
    original = [sample.path.read_bytes() for sample in copies]
    monkeypatch.setattr(inspection, "read_image_file", lambda path: _read_and_replace(path))
    collector = Collector()
    records = inspected(copies, tmp_path / "cache", collector)
    monkeypatch.undo()
    assert [record.sha256 for record in records] == [hashlib.sha256(data).hexdigest() for data in original]
    fresh = inspected(samples, tmp_path / "fresh")
    for record, pixels, same in zip(records, expected, fresh, strict=True):
        assert np.array_equal(collector.pixels[record.sha256], pixels)
        assert np.array_equal(record.fingerprint, same.fingerprint)  # type: ignore[arg-type]
        with pytest.raises(ChangedImageError) as raised:
            read_pixels(record, PREPROCESSING)
        assert str(raised.value) == f"{record.sample.path} has changed since it was inspected. Restore it."
        record.sample.path.unlink()
        with pytest.raises(ChangedImageError, match=r"can no longer be read \(No such file or directory\)\. Put it back\."):
            read_pixels(record, PREPROCESSING)


def _read_and_replace(path: Path) -> bytes:
    data = path.read_bytes()
    Image.new("RGB", (64, 64), "green").save(path, "JPEG")
    return data


def test_training_on_images_that_are_decoded_in_every_epoch(
    samples: list[Sample], expected: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    class Identity:
        def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return pixels

    records = inspected(samples, tmp_path)
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


def test_a_fingerprint_is_the_same_from_the_cache(samples: list[Sample], tmp_path: Path) -> None:
    first, again, with_pixels = (inspected(samples, tmp_path, collector) for collector in (None, None, Collector()))
    for one, two, three in zip(first, again, with_pixels, strict=True):
        assert one.fingerprint is not None
        assert np.array_equal(one.fingerprint, two.fingerprint)  # type: ignore[arg-type]
        assert np.array_equal(one.fingerprint, three.fingerprint)  # type: ignore[arg-type]


def test_a_fingerprint_that_is_pruned_meanwhile_is_computed_again(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = inspected(samples, tmp_path)
    monkeypatch.setattr(ArrayStore, "load", lambda store, keys: {})
    for one, two in zip(first, inspected(samples, tmp_path), strict=True):
        assert np.array_equal(one.fingerprint, two.fingerprint)  # type: ignore[arg-type]


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
    assert len(find_duplicates(inspected(samples, tmp_path / "cache"))) == 1
