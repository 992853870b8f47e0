"""Batches of features and labels for training, from cached features or computed from images in every epoch."""

from __future__ import annotations

import copy
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


class _Order:
    """The labels of a split, and the images of each batch.

    Args:
        labels: The label of each image.
        batch_size: Images per batch.
        seed: Seed of the order.
        balanced: See ``epoch_order``.
    """

    def __init__(self, labels: Sequence[int], *, batch_size: int, seed: int, balanced: bool) -> None:
        self._labels = torch.tensor(labels, dtype=torch.long)
        self._batch_size = batch_size
        self._seed = seed
        self._balanced = balanced

    def __len__(self) -> int:
        return len(self._labels)

    def _epoch_order(self, epoch: int) -> Tensor:
        return epoch_order(self._labels, self._seed, epoch, balanced=self._balanced)

    def _shuffled_indices(self, epoch: int, min_batch: int) -> list[Tensor]:
        return shuffled_batches(self._epoch_order(epoch), self._batch_size, min_batch=min_batch)

    def _ordered_indices(self) -> list[Tensor]:
        return ordered_batches(len(self), self._batch_size)


class CachedBatches(_Order):
    """Batches of precomputed features.

    Args:
        features: The features, which are not copied.
        labels: The label of each image.
        rows: The rows of ``features`` that are the images. None: all.
        batch_size: Images per batch.
        seed: Seed of the order.
        balanced: See ``epoch_order``.
    """

    def __init__(
        self,
        features: NDArray[np.float32],
        labels: Sequence[int],
        *,
        rows: NDArray[np.intp] | None = None,
        batch_size: int,
        seed: int,
        balanced: bool = False,
    ) -> None:
        super().__init__(labels, batch_size=batch_size, seed=seed, balanced=balanced)
        self._features = torch.from_numpy(features)
        self._rows = torch.arange(len(features)) if rows is None else torch.from_numpy(rows)

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        return self._load(self._shuffled_indices(epoch, min_batch))

    def ordered(self) -> Iterator[Batch]:
        return self._load(self._ordered_indices())

    def with_sampling(self, *, balanced: bool) -> CachedBatches:
        """Return batches of the same features, drawn equally from each class or not."""
        other = copy.copy(self)
        other._balanced = balanced
        return other

    def _load(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for indices in batches:
            images = indices % len(self)
            yield self._features[self._rows[images]], self._labels[images]


class InMemoryBatches(_Order):
    """Batches of images that are held in memory as pixels. Only the frozen layers run again in every epoch.

    Args:
        pixels: The network's input for each image, (N, H, W, C) uint8.
        labels: The label of each image.
        frozen: The frozen layers.
        augment: Changes the pixels of the shuffled batches, in a thread of its own.
        batch_size: Images per batch.
        seed: Seed of the order.
        balanced: See ``epoch_order``.
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
        balanced: bool = False,
    ) -> None:
        super().__init__(labels, batch_size=batch_size, seed=seed, balanced=balanced)
        self._pixels = torch.from_numpy(pixels)
        self._frozen = frozen
        self._augment = augment

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        order = self._epoch_order(epoch)
        batches = shuffled_batches(order, self._batch_size, min_batch=min_batch)
        if self._augment is None:
            yield from map(self._load, batches)
        else:
            views = self._augment.epoch_views(len(self), epoch)
            rows = torch.arange(len(self)) if self._balanced else order  # a repeated image has a view for each repetition
            view_batches = [views[own] for own in shuffled_batches(rows, self._batch_size, min_batch=min_batch)]
            pairs = zip(batches, view_batches, strict=True)
            yield from threaded_map(lambda pair: self._load(*pair), pairs, workers=1, buffer_size=2)

    def ordered(self) -> Iterator[Batch]:
        return map(self._load, self._ordered_indices())

    def _load(self, indices: Tensor, views: Tensor | None = None) -> Batch:
        images = indices % len(self)
        if not len(images):
            return torch.empty(0), self._labels[images]
        pixels = self._pixels[images]
        if self._augment is not None and views is not None:
            pixels = self._augment.apply(pixels, views)
        return torch.from_numpy(self._frozen.run(pixels.numpy())), self._labels[images]


class UncachedBatches(_Order):
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
        balanced: bool = False,
    ) -> None:
        labels = [record.sample.label for record in records]
        super().__init__(labels, batch_size=batch_size, seed=seed, balanced=balanced)
        self._records = records
        self._preprocessing = preprocessing
        self._frozen = frozen
        self._augment = augment
        self._workers = workers

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[Batch]:
        return self._load(self._shuffled_indices(epoch, min_batch), epoch)

    def ordered(self) -> Iterator[Batch]:
        return self._load(self._ordered_indices(), None)

    def _load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        def pixels(drawn: int) -> NDArray[np.uint8]:
            record = self._records[drawn % len(self)]
            data = read_inspected(record.sample.path, record.sha256)
            if self._augment is not None and epoch is not None:
                return self._augment.crop(self._preprocessing.decode(data), epoch=epoch, index=drawn)
            return self._preprocessing.pixels(data)

        lists = [indices.tolist() for indices in batches]
        loaded = threaded_map(pixels, chain.from_iterable(lists), workers=self._workers, buffer_size=2 * self._batch_size)
        for indices in lists:
            images = list(islice(loaded, len(indices)))
            features = torch.from_numpy(self._frozen.run(np.stack(images))) if images else torch.empty(0)
            yield features, self._labels[torch.tensor(indices, dtype=torch.long) % len(self)]


def shuffled_batches(order: Tensor, batch_size: int, *, min_batch: int = 1) -> list[Tensor]:
    """Divide an epoch's order into batches and return this process's shard of each.

    The batches are those of a single process. A last batch of fewer than ``min_batch`` images is merged into the one before.
    """
    batches = list(torch.split(order, batch_size))
    if len(batches) > 1 and len(batches[-1]) < min_batch:
        batches[-2:] = [torch.cat(batches[-2:])]
    return [indices[distributed.shard_slice(len(indices))] for indices in batches]


def ordered_batches(count: int, batch_size: int) -> list[Tensor]:
    """Return the indices of this process's shard of the ordered images, in batches. The shards concatenate to all images."""
    indices = torch.arange(count)[distributed.shard_slice(count)]
    return list(torch.split(indices, batch_size)) if len(indices) else []


def epoch_order(labels: Tensor, seed: int, epoch: int, *, balanced: bool = False) -> Tensor:
    """Return the order of an epoch's images. It depends only on the arguments, so a resumed run repeats it.

    Args:
        labels: The class of each image, (N,).
        seed: The seed of the run.
        epoch: The epoch, from 0.
        balanced: Draw equally many images of each class. Images of a small class repeat evenly, and those of a large class
            take turns over the epochs.

    Returns:
        N indices. Index ``i + k * N`` is image ``i`` when it is drawn for the ``k``-th further time.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    count = len(labels)
    if not balanced:
        return torch.randperm(count, generator=rng)
    drawn = []
    for label, draws in enumerate(balanced_draws(torch.bincount(labels).tolist())):
        members = torch.nonzero(labels == label).flatten()
        rounds = -(-draws // max(len(members), 1))
        shuffled = [members[torch.randperm(len(members), generator=rng)] + k * count for k in range(rounds)]
        drawn += [torch.cat(shuffled)[:draws]] if shuffled else []
    indices = torch.cat(drawn)
    return indices[torch.randperm(count, generator=rng)]


def balanced_draws(counts: Sequence[int]) -> list[int]:
    """Divide an epoch of ``sum(counts)`` draws evenly among the classes that have images."""
    present = [label for label, count in enumerate(counts) if count]
    draws, rest = divmod(sum(counts), max(len(present), 1))
    return [0 if not count else draws + (present.index(label) < rest) for label, count in enumerate(counts)]
