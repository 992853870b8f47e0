"""Odd files are recognized by what is drawn, and stored with the predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from finetune.data.image_folder import Sample
from finetune.data.inspection import fingerprint_context, inspect_images, table_columns
from finetune.data.odd_files import find_odd_files, measure_image
from finetune.io.array_store import ArrayStore

NORMAL = (400, 300)


def noise(size: tuple[int, int], low: int = 0, high: int = 255, *, cell: int = 4, seed: int = 0) -> Image.Image:
    """Draw random squares, which are as sharp as an image can be."""
    small = np.random.default_rng(seed).integers(low, high + 1, (-(-size[1] // cell), -(-size[0] // cell), 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(cell, 0).repeat(cell, 1)[: size[1], : size[0]])


IMAGES = {
    "": noise(NORMAL, cell=16),
    "dark": noise(NORMAL, 0, 60, cell=16),
    "bright": noise(NORMAL, 246, 255, cell=16),
    "blurred": noise(NORMAL, cell=16).filter(ImageFilter.GaussianBlur(30)).point(lambda level: (level - 100) * 4),
    "odd shape": noise((700, 172), cell=16),
    "odd size": noise((1600, 1200), cell=64),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """One image of each kind, among ordinary ones of slightly different sizes."""
    folder = tmp_path_factory.mktemp("odd")
    ordinary = [noise((400 + i, 300), cell=16, seed=i) for i in range(12)]
    drawn = [*((f"ordinary {i}", image) for i, image in enumerate(ordinary)), *IMAGES.items()]
    samples = []
    for name, image in drawn:
        path = folder / f"{name or 'normal'}.png"
        image.save(path)
        samples.append(Sample(path.name, path, 0, "valid"))
    return samples


def test_each_kind_is_recognized_and_ordinary_images_are_not() -> None:
    ordinary = [noise((400 + i, 300), cell=16, seed=i) for i in range(12)]
    images = [*ordinary, *IMAGES.values()]
    found = find_odd_files(np.array([measure_image(image, image.size) for image in images]))
    assert found[: len(ordinary)] == [""] * len(ordinary)
    for kind, text in zip(IMAGES, found[len(ordinary) :], strict=True):
        assert kind in text.split(", ") or text == kind == "", (kind, text)
    assert find_odd_files(np.zeros((0, 6), dtype=np.float32)) == []


def test_the_full_size_counts_and_the_cache_keeps_the_measures(samples: list[Sample], tmp_path: Path) -> None:
    """A large image is decoded at a reduced size, and the second inspection decodes nothing."""
    store = ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10)
    first = inspect_images(samples, store=store, quiet=True)
    again = inspect_images(samples, store=ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10), quiet=True)
    columns = table_columns(first)["odd_files"]
    assert columns == table_columns(again)["odd_files"]
    by_name = {record.sample.name: text for record, text in zip(first, columns, strict=True)}
    assert by_name["odd size.png"] == "odd size"
    assert tuple(first[-1].measures[-2:]) == (1600, 1200)
    assert table_columns(first[:12])["odd_files"] == ()
