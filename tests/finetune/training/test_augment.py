from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.training.augmentation import AREA_RANGE, Augment, BatchAugment
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


def ramps(count: int) -> torch.Tensor:
    """Images (count, 32, 32, 3), red to the right and green downward, so that the colors show the crop."""
    ramp = torch.zeros(32, 32, 3)
    ramp[:, :, 0] = torch.linspace(0, 255, 32)
    ramp[:, :, 1] = torch.linspace(0, 255, 32)[:, None]
    return ramp.to(torch.uint8).expand(count, -1, -1, -1).contiguous()


def test_views_of_a_batch_depend_only_on_seed_epoch_and_image() -> None:
    augment = BatchAugment(seed=3)
    views = augment.epoch_views(20, epoch=2)
    batch = augment.apply(ramps(20), views)
    assert (batch.shape, batch.dtype) == ((20, 32, 32, 3), torch.uint8)
    rows = torch.tensor([17, 4])
    assert torch.equal(BatchAugment(seed=3).apply(ramps(2), BatchAugment(seed=3).epoch_views(20, epoch=2)[rows]), batch[rows])
    for other in (augment.epoch_views(20, epoch=3), BatchAugment(seed=4).epoch_views(20, epoch=2)):
        assert not torch.equal(other, views)


def test_views_of_a_batch_are_random_crops_flipped_half_of_the_time() -> None:
    augment = BatchAugment(seed=0)
    views = augment.apply(ramps(400), augment.epoch_views(400, epoch=0)).numpy().astype(float)
    rightwards = views[:, :, -1, 0].mean(1) > views[:, :, 0, 0].mean(1)
    assert 0.4 < rightwards.mean() < 0.6
    assert (views[:, -1, :, 1].mean(1) > views[:, 0, :, 1].mean(1)).all()  # never upside down
    widths = abs(views[:, :, -1, 0].mean(1) - views[:, :, 0, 0].mean(1)) / 255
    heights = abs(views[:, -1, :, 1].mean(1) - views[:, 0, :, 1].mean(1)) / 255
    areas = widths * heights
    assert np.quantile(areas, 0.05) > 0.6 * AREA_RANGE[0]  # color jitter changes the levels
    assert areas.min() < 0.45 < 0.75 < areas.max()


def test_a_view_of_the_complete_image_without_jitter_is_the_image() -> None:
    """The numbers stand for: all of the area, aspect ratio 1, any position, not flipped, and three neutral jitters."""
    neutral = torch.tensor([[1.0, 0.5, 0.3, 0.8, 0.9, 0.5, 0.5, 0.5]])
    for pixels in (ramps(1), ramps(1)[..., :1]):
        assert (BatchAugment(seed=0).apply(pixels, neutral).int() - pixels.int()).abs().max() <= 1


def test_a_flipped_view_is_mirrored() -> None:
    flipped = torch.tensor([[1.0, 0.5, 0.3, 0.8, 0.1, 0.5, 0.5, 0.5]])
    view = BatchAugment(seed=0).apply(ramps(1), flipped)
    assert (view.int() - ramps(1).flip(2).int()).abs().max() <= 1
