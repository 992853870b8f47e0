"""What an epoch is made of: batches of features and labels, from the cache or computed anew from photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.compute import distributed
from finetune.data.image_folder import Sample
from finetune.features.extractor import FeatureExtractor
from finetune.io.threaded_map import threaded_map
from finetune.training.augment import Augment
from models.preprocess import Preprocessing

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """``shuffled(epoch)`` gives an epoch in that epoch's random order, ``ordered()`` the photos one after another.

    A batch is features (n, ...) float32 and labels (n,) int64, on the CPU. Where several processes train, each is given its
    share of every batch, which may be empty, and of the photos in order.
    """

    def __len__(self) -> int: ...
    def shuffled(self, epoch: int) -> Iterator[Batch]: ...
    def ordered(self) -> Iterator[Batch]: ...


class CachedBatches:
    """Batches of features that were computed before."""

    def __init__(self, features: NDArray[np.float32], labels: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._features = torch.from_numpy(features)
        self._labels = torch.tensor(labels, dtype=torch.long)
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self._labels)

    def shuffled(self, epoch: int) -> Iterator[Batch]:
        return self._take(shuffled_batches(len(self), self._batch_size, self._seed, epoch))

    def ordered(self) -> Iterator[Batch]:
        return self._take(ordered_batches(len(self), self._batch_size))

    def _take(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        for part in parts:
            yield self._features[part], self._labels[part]


MAX_CACHED_BYTES = 512 * 2**20


class UncachedBatches:
    """Batches of photos; what lies before the cut runs over them in every epoch.

    They are decoded each time too, but for those that are kept: 512 MB of pixels, which is 680,000 grey photos of 28 px or
    3,500 coloured ones of 224 px.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        preprocessing: Preprocessing,
        frozen: FeatureExtractor,
        augment: Augment | None,
        batch_size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        self._samples = samples
        self._preprocessing = preprocessing
        self._frozen = frozen
        self._augment = augment
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._room = MAX_CACHED_BYTES // (preprocessing.input_px**2 * preprocessing.channels)

    def __len__(self) -> int:
        return len(self._samples)

    def shuffled(self, epoch: int) -> Iterator[Batch]:
        return self._load(shuffled_batches(len(self), self._batch_size, self._seed, epoch), epoch)

    def ordered(self) -> Iterator[Batch]:
        return self._load(ordered_batches(len(self), self._batch_size), None)

    def _load(self, parts: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        def pixels(index: int) -> NDArray[np.uint8]:
            if index in self._kept:
                return self._kept[index]
            data = self._samples[index].path.read_bytes()
            if self._augment is not None and epoch is not None:
                return self._augment.crop(self._preprocessing.decode(data), epoch=epoch, index=index)
            picture = self._preprocessing.pixels(data)
            if self._augment is None and len(self._kept) < self._room:
                self._kept[index] = picture
            return picture

        lists = [part.tolist() for part in parts]
        loaded = threaded_map(pixels, chain.from_iterable(lists), workers=self._workers, buffer_size=2 * self._batch_size)
        for indices in lists:
            pictures = list(islice(loaded, len(indices)))
            features = torch.from_numpy(self._frozen.run(np.stack(pictures))) if pictures else torch.empty(0)
            yield features, torch.tensor([self._samples[i].label for i in indices], dtype=torch.long)


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """This process's share of each batch of an epoch, as indices; the batches are those of a single process."""
    whole = torch.split(epoch_permutation(count, seed, epoch), batch_size)
    return [part[distributed.shard_slice(len(part))] for part in whole]


def ordered_batches(count: int, batch_size: int) -> list[Tensor]:
    """This process's share of all photos in order, in batches; all shares one after another are all photos."""
    mine = torch.arange(count)[distributed.shard_slice(count)]
    return list(torch.split(mine, batch_size)) if len(mine) else []


def epoch_permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's photos; it depends on nothing but its arguments, so a resumed run draws it again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
