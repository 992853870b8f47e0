"""What an epoch is made of: batches of features and labels, from the cache or computed anew from photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.augment import Augment
from finetune.data import Photo
from finetune.features import FrozenPart, batched
from finetune.prefetch import prefetch
from models.preprocess import Preprocessing

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """``shuffled(epoch)`` gives an epoch in that epoch's random order, ``ordered()`` the photos one after another.

    A batch is features (n, ...) float32 and labels (n,) int64, on the CPU.
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
        return self._take(epoch_order(len(self), self._seed, epoch))

    def ordered(self) -> Iterator[Batch]:
        return self._take(torch.arange(len(self)))

    def _take(self, order: Tensor) -> Iterator[Batch]:
        for part in torch.split(order, self._batch_size):
            yield self._features[part], self._labels[part]


KEEP_BYTES = 512 * 2**20


class LiveBatches:
    """Batches of photos; what lies before the cut runs over them in every epoch.

    They are decoded each time too, but for those that are kept: 512 MB of pixels, which is 680,000 grey photos of 28 px or
    3,500 coloured ones of 224 px.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        *,
        preprocessing: Preprocessing,
        frozen: FrozenPart,
        augment: Augment | None,
        batch_size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        self._photos = photos
        self._preprocessing = preprocessing
        self._frozen = frozen
        self._augment = augment
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._room = KEEP_BYTES // (preprocessing.input_px**2 * preprocessing.channels)

    def __len__(self) -> int:
        return len(self._photos)

    def shuffled(self, epoch: int) -> Iterator[Batch]:
        return self._load(epoch_order(len(self), self._seed, epoch).tolist(), epoch)

    def ordered(self) -> Iterator[Batch]:
        return self._load(range(len(self)), None)

    def _load(self, order: Sequence[int], epoch: int | None) -> Iterator[Batch]:
        def pixels(index: int) -> NDArray[np.uint8]:
            if index in self._kept:
                return self._kept[index]
            data = self._photos[index].path.read_bytes()
            if self._augment is not None and epoch is not None:
                return self._augment.crop(self._preprocessing.decode(data), epoch=epoch, index=index)
            picture = self._preprocessing.pixels(data)
            if self._augment is None and len(self._kept) < self._room:
                self._kept[index] = picture
            return picture

        loaded = prefetch(pixels, order, workers=self._workers, ahead=2 * self._batch_size)
        for batch in batched(zip(order, loaded, strict=True), self._batch_size):
            indices, pictures = zip(*batch, strict=True)
            yield torch.from_numpy(self._frozen.run(np.stack(pictures))), torch.tensor([self._photos[i].label for i in indices])


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's photos; it depends on nothing but its arguments, so a resumed run draws it again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
