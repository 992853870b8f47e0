"""Batches of features and labels for training, from cached features or computed from images in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.compute import distributed
from finetune.data.inspection import ImageRecord, read_inspected
from finetune.features.extractor import FeatureExtractor
from finetune.io.threaded_map import threaded_map
from finetune.training.augmentation import Augment, BatchAugment
from models.preprocess import Preprocessing

Batch = tuple[Tensor, Tensor]


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


class InMemoryBatches:
    """Batches of images that are held in memory as pixels. Only the frozen layers run again in every epoch.

    Args:
        pixels: The network's input for each image, (N, H, W, C) uint8.
        labels: The label of each image.
        frozen: The frozen layers.
        augment: Changes the pixels of the shuffled batches, in a thread of its own.
        batch_size: Images per batch.
        seed: Seed of the order.
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: Sequence[int],
        *,
        frozen: FeatureExtractor,
        augment: BatchAugment | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self._pixels = torch.from_numpy(pixels)
        self._labels = torch.tensor(labels, dtype=torch.long)
        self._frozen = frozen
        self._augment = augment
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self._labels)

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        batches = shuffled_batches(len(self), self._batch_size, self._seed, epoch, min_batch=min_batch)
        if self._augment is None:
            yield from map(self._load, batches)
        else:
            views = self._augment.epoch_views(len(self), epoch)
            yield from threaded_map(lambda indices: self._load(indices, views), batches, workers=1, buffer_size=2)

    def ordered(self) -> Iterator[Batch]:
        return map(self._load, ordered_batches(len(self), self._batch_size))

    def _load(self, indices: Tensor, views: Tensor | None = None) -> Batch:
        if not len(indices):
            return torch.empty(0), self._labels[indices]
        pixels = self._pixels[indices]
        if self._augment is not None and views is not None:
            pixels = self._augment.apply(pixels, views[indices])
        return torch.from_numpy(self._frozen.run(pixels.numpy())), self._labels[indices]


class UncachedBatches:
    """Batches of images that are decoded, and whose features are computed, in every epoch."""

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

    def __len__(self) -> int:
        return len(self._records)

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        return self._load(shuffled_batches(len(self), self._batch_size, self._seed, epoch, min_batch=min_batch), epoch)

    def ordered(self) -> Iterator[Batch]:
        return self._load(ordered_batches(len(self), self._batch_size), None)

    def _load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        def pixels(index: int) -> NDArray[np.uint8]:
            record = self._records[index]
            data = read_inspected(record.sample.path, record.sha256)
            if self._augment is not None and epoch is not None:
                return self._augment.crop(self._preprocessing.decode(data), epoch=epoch, index=index)
            return self._preprocessing.pixels(data)

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
