from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.training.data_loaders import AREA_RANGE, Augment
from tests.helpers.tiny_network import COLORS, TINY, paint

PREPROCESSING = TINY.preprocessing


@pytest.fixture
def photo(tmp_path: Path) -> Image.Image:
    return Image.open(paint(tmp_path / "photo.png", COLORS[0], seed=1, size=(120, 90)))


def test_a_view_has_the_input_shape_of_the_network(photo: Image.Image) -> None:
    view = Augment(PREPROCESSING, seed=0).crop(photo, epoch=0, index=0)
    assert (view.shape, view.dtype) == ((32, 32, 3), np.uint8)
    gray = replace(PREPROCESSING, mean=(0.5,), std=(0.5,))
    assert Augment(gray, seed=0).crop(photo, epoch=0, index=0).shape == (32, 32, 1)


def test_a_view_depends_only_on_seed_epoch_and_photo(photo: Image.Image) -> None:
    augment = Augment(PREPROCESSING, seed=3)
    first = augment.crop(photo, epoch=2, index=5)
    augment.crop(photo, epoch=0, index=0)
    np.testing.assert_array_equal(Augment(PREPROCESSING, seed=3).crop(photo, epoch=2, index=5), first)
    for other in (
        augment.crop(photo, epoch=3, index=5),
        augment.crop(photo, epoch=2, index=6),
        Augment(PREPROCESSING, seed=4).crop(photo, epoch=2, index=5),
    ):
        assert (other != first).any()


def test_a_view_is_a_random_crop_flipped_half_of_the_time() -> None:
    """The photo is a color ramp, red to the right and green downward, so the colors show the crop."""
    ramp = np.zeros((200, 300, 3), np.uint8)
    ramp[:, :, 0] = np.linspace(0, 255, 300)[None]
    ramp[:, :, 1] = np.linspace(0, 255, 200)[:, None]
    photo = Image.fromarray(ramp)
    augment = Augment(PREPROCESSING, seed=0)
    views = [augment.crop(photo, epoch=0, index=i).astype(float) for i in range(400)]
    rightwards = [view[:, -1, 0].mean() > view[:, 0, 0].mean() for view in views]
    assert 0.4 < np.mean(rightwards) < 0.6
    assert all(view[-1, :, 1].mean() > view[0, :, 1].mean() for view in views)  # never upside down
    widths = [abs(view[:, -1, 0].mean() - view[:, 0, 0].mean()) / 255 for view in views]
    heights = [abs(view[-1, :, 1].mean() - view[0, :, 1].mean()) / 255 for view in views]
    areas = np.multiply(widths, heights)
    assert np.quantile(areas, 0.05) > 0.6 * AREA_RANGE[0]  # color jitter changes the levels
    assert areas.min() < 0.45 < 0.75 < areas.max()


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (32, 32)])
def test_extreme_aspect_ratios(size: tuple[int, int]) -> None:
    view = Augment(PREPROCESSING, seed=0).crop(Image.new("RGB", size, (10, 200, 30)), epoch=0, index=0)
    assert view.shape == (32, 32, 3)
    assert view[..., 1].min() > 100 > view[..., 0].max()
