"""Random views of training images: a crop, a horizontal flip and color jitter.

The random numbers depend only on seed, epoch and image, so they do not change with threads, batches or when a run is resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional

from models.preprocess import INTERPOLATIONS, Preprocessing

# The ranges of torchvision's RandomResizedCrop and of common ImageNet recipes
AREA_RANGE = (0.35, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)
JITTER = 0.2
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # the luma of ITU-R BT.601, as in Pillow


@dataclass(frozen=True)
class Augment:
    """Draws a random view of a photo, from its full resolution."""

    preprocessing: Preprocessing
    seed: int

    def crop(self, image: Image.Image, *, epoch: int, index: int) -> NDArray[np.uint8]:
        """Return a random view of an RGB image, (input_px, input_px, channels) uint8."""
        rng = np.random.default_rng((self.seed, epoch, index))
        side = self.preprocessing.input_px
        view = image.resize((side, side), INTERPOLATIONS[self.preprocessing.interpolation], _random_box(image.size, rng))
        if rng.random() < 0.5:
            view = ImageOps.mirror(view)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
        pixels = np.asarray(view.convert("RGB" if self.preprocessing.channels == 3 else "L"))
        return pixels.reshape(side, side, self.preprocessing.channels)


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw a box of random area and aspect ratio within the image, (left, top, right, bottom) in pixels."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*AREA_RANGE)
        aspect = math.exp(rng.uniform(math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


@dataclass(frozen=True)
class BatchAugment:
    """Draws random views of small images in memory, a batch at once."""

    seed: int

    def epoch_views(self, count: int, epoch: int) -> Tensor:
        """Draw the views of all images of an epoch: (count, 8) uniform numbers in 0..1."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.rand(count, 8, generator=generator)

    def apply(self, pixels: Tensor, views: Tensor) -> Tensor:
        """Return the views (N, H, W, C) uint8 of square images of the same shape."""
        area, aspect, left, top, flip, *jitter = views.unbind(1)
        area = AREA_RANGE[0] + area * (AREA_RANGE[1] - AREA_RANGE[0])
        ratio = torch.exp(math.log(ASPECT_RANGE[0]) + aspect * math.log(ASPECT_RANGE[1] / ASPECT_RANGE[0]))
        # Fractions of the side. A crop that is too wide or too high for its area is cut off at the image's border.
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        center_x, center_y = (2 * left - 1) * (1 - width), (2 * top - 1) * (1 - height)
        zero = torch.zeros_like(width)
        width = torch.where(flip < 0.5, -width, width)
        matrix = torch.stack([width, zero, center_x, zero, height, center_y], 1).reshape(-1, 2, 3)
        images = pixels.permute(0, 3, 1, 2).float()
        grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        brightness, contrast, color = ((1 - JITTER + 2 * JITTER * amount).reshape(-1, 1, 1, 1) for amount in jitter)
        images = (images * brightness).clamp(0, 255)
        mean = _luma(images).mean((2, 3), keepdim=True)
        images = (mean + (images - mean) * contrast).clamp(0, 255)
        if images.shape[1] == 3:
            gray = _luma(images)
            images = (gray + (images - gray) * color).clamp(0, 255)
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _luma(images: Tensor) -> Tensor:
    """Convert (N, C, H, W) to brightness (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    return (images * torch.tensor(GRAY_WEIGHTS).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
