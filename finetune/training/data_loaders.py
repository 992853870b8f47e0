"""Batches of features and labels for training, from cached features or computed from images in every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from finetune.compute import distributed
from finetune.data.inspection import ImageRecord, read_inspected
from finetune.features.extractor import FeatureExtractor
from finetune.io.threaded_map import threaded_map
from models.preprocess import INTERPOLATIONS, Preprocessing

Batch = tuple[Tensor, Tensor]
# Ranges of the augmentation: those of torchvision's RandomResizedCrop and common ImageNet recipes
AREA_RANGE = (0.35, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)
JITTER = 0.2


class Batches(Protocol):
    """An iterable over the batches of a split.

    ``shuffled(epoch)`` yields the batches in the random order of that epoch, ``ordered()`` in the order of the images. A last
    shuffled batch of fewer than ``min_batch`` images is merged into the one before. A batch
    is features (n, ...) float32 and labels (n,) int64, on the CPU. In distributed training each process gets its shard of every
    batch, which may be empty, and of the ordered images.
    """

    def __len__(self) -> int: ...
    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]: ...
    def ordered(self) -> Iterator[Batch]: ...


class CachedBatches:
    """Batches of precomputed features."""

    def __init__(self, features: NDArray[np.float32], labels: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._features = torch.from_numpy(features)
        self._labels = torch.tensor(labels, dtype=torch.long)
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self._labels)

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        return self._load(shuffled_batches(len(self), self._batch_size, self._seed, epoch, min_batch=min_batch))

    def ordered(self) -> Iterator[Batch]:
        return self._load(ordered_batches(len(self), self._batch_size))

    def _load(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for indices in batches:
            yield self._features[indices], self._labels[indices]


@dataclass(frozen=True)
class Augment:
    """Random resized crop, horizontal flip and color jitter.

    The random numbers depend only on seed, epoch and image, so they do not change with threads or when a run is resumed.
    """

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


MAX_CACHED_BYTES = 512 * 2**20


class UncachedBatches:
    """Batches of images whose features are computed in every epoch.

    Up to 512 MB of decoded pixels are cached (680,000 gray images of 28 px or 3,500 color images of 224 px). The rest are
    decoded in every epoch.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        *,
        preprocessing: Preprocessing,
        frozen: FeatureExtractor,
        augment: Augment | None,
        batch_size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        self._records = records
        self._preprocessing = preprocessing
        self._frozen = frozen
        self._augment = augment
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._pixel_cache: dict[int, NDArray[np.uint8]] = {}
        self._max_cached_images = MAX_CACHED_BYTES // (preprocessing.input_px**2 * preprocessing.channels)

    def __len__(self) -> int:
        return len(self._records)

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        return self._load(shuffled_batches(len(self), self._batch_size, self._seed, epoch, min_batch=min_batch), epoch)

    def ordered(self) -> Iterator[Batch]:
        return self._load(ordered_batches(len(self), self._batch_size), None)

    def _load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        def pixels(index: int) -> NDArray[np.uint8]:
            if index in self._pixel_cache:
                return self._pixel_cache[index]
            record = self._records[index]
            data = read_inspected(record.sample.path, record.sha256)
            if self._augment is not None and epoch is not None:
                return self._augment.crop(self._preprocessing.decode(data), epoch=epoch, index=index)
            image = self._preprocessing.pixels(data)
            if self._augment is None and len(self._pixel_cache) < self._max_cached_images:
                self._pixel_cache[index] = image
            return image

        lists = [indices.tolist() for indices in batches]
        loaded = threaded_map(pixels, chain.from_iterable(lists), workers=self._workers, buffer_size=2 * self._batch_size)
        for indices in lists:
            images = list(islice(loaded, len(indices)))
            features = torch.from_numpy(self._frozen.run(np.stack(images))) if images else torch.empty(0)
            yield features, torch.tensor([self._records[i].sample.label for i in indices], dtype=torch.long)


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int, *, min_batch: int = 1) -> list[Tensor]:
    """Return the indices of this process's shard of each batch of an epoch.

    The batches are those of a single process. A last batch of fewer than ``min_batch`` images is merged into the one before.
    """
    batches = list(torch.split(epoch_permutation(count, seed, epoch), batch_size))
    if len(batches) > 1 and len(batches[-1]) < min_batch:
        batches[-2:] = [torch.cat(batches[-2:])]
    return [indices[distributed.shard_slice(len(indices))] for indices in batches]


def ordered_batches(count: int, batch_size: int) -> list[Tensor]:
    """Return the indices of this process's shard of the ordered images, in batches. The shards concatenate to all images."""
    indices = torch.arange(count)[distributed.shard_slice(count)]
    return list(torch.split(indices, batch_size)) if len(indices) else []


def epoch_permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's images. It depends only on the arguments, so a resumed run repeats it."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
