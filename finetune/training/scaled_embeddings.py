"""Embeddings on a common scale, in float64 with few rows in memory at a time.

In float64, many embeddings would take twice the memory that they take in float32, and again for each part of them that a head
is fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.networks.spec import STANDARD, UNIT

CHUNK_BYTES = 2 << 20  # a chunk that fits in a processor's cache
MAX_DENSE_BYTES = 48 << 20  # embeddings of up to this size in float64 are converted once
Floats = NDArray[np.float64]


class ScaledEmbeddings:
    """Rows of embeddings, divided by their scale when they are read.

    Args:
        embeddings: The embeddings (M, d), which are not copied.
        lengths: What to divide each embedding by, (M,). None: nothing.
        divisor: What to divide all embeddings by: a number, or one for each dimension.
        rows: The rows of ``embeddings`` to use, (N,). None: all.
    """

    def __init__(
        self,
        embeddings: NDArray[np.floating[Any]],
        *,
        lengths: Floats | None = None,
        divisor: Floats | float = 1.0,
        rows: NDArray[np.intp] | None = None,
    ) -> None:
        self._embeddings = embeddings
        self._lengths = lengths
        self._divisor = divisor
        self._rows = rows

    def __len__(self) -> int:
        return len(self._embeddings) if self._rows is None else len(self._rows)

    @property
    def dimensions(self) -> int:
        """The number of dimensions of each embedding."""
        return int(self._embeddings.shape[1])

    def __getitem__(self, rows: NDArray[np.intp]) -> ScaledEmbeddings:
        """Return some of the rows without a copy."""
        rows = rows if self._rows is None else self._rows[rows]
        return ScaledEmbeddings(self._embeddings, lengths=self._lengths, divisor=self._divisor, rows=rows)

    def chunks(self) -> Iterator[tuple[slice, Floats]]:
        """Yield all rows in order: the position of each chunk, and its scaled rows (n, d)."""
        step = max(1, CHUNK_BYTES // (8 * self.dimensions))
        for start in range(0, len(self), step):
            chunk = slice(start, min(start + step, len(self)))
            yield chunk, self._scaled(chunk if self._rows is None else self._rows[chunk])

    def dense(self) -> Floats:
        """Return all scaled rows, (N, d)."""
        return self._scaled(slice(None) if self._rows is None else self._rows)

    def dense_if_small(self) -> ScaledEmbeddings:
        """Convert the rows now if that takes little memory, as it is faster than to convert them each time they are read."""
        return ScaledEmbeddings(self.dense()) if len(self) * self.dimensions * 8 <= MAX_DENSE_BYTES else self

    def _scaled(self, rows: slice | NDArray[np.intp]) -> Floats:
        chunk = self._embeddings[rows]
        if self._lengths is not None:
            chunk = chunk / self._lengths[rows, None]  # converts as well
        if not (np.isscalar(self._divisor) and self._divisor == 1):
            chunk = chunk / np.asarray(self._divisor)
        return chunk.astype(np.float64, copy=False)


def scale_embeddings(embeddings: NDArray[np.floating[Any]], normalization: str) -> tuple[ScaledEmbeddings, Floats | float]:
    """Scale embeddings (N, d) to lengths of about 1, so that the same penalties suit all networks.

    Args:
        embeddings: The embeddings.
        normalization: ``unit`` scales each to length 1, as ``NormalizedLinear`` does, ``none`` all of them by one factor, and
            ``standard`` each dimension to the same standard deviation.

    Returns:
        The scaled embeddings, and their divisor apart from the length of each: fitted weights are divided by it.
    """
    raw = ScaledEmbeddings(embeddings)
    if normalization == STANDARD:
        mean = mean_embedding(raw)
        spread = np.sqrt(sum(((chunk - mean) ** 2).sum(axis=0) for _, chunk in raw.chunks()) / len(raw))
        divisor: Floats | float = np.where(spread > 0, spread, 1.0) * np.sqrt(raw.dimensions)
        return ScaledEmbeddings(embeddings, divisor=divisor), divisor
    squares = np.concatenate([(chunk**2).sum(axis=1) for _, chunk in raw.chunks()])
    if normalization == UNIT:
        return ScaledEmbeddings(embeddings, lengths=np.maximum(np.sqrt(squares), 1e-12)), 1.0
    divisor = float(np.sqrt(squares.mean())) or 1.0
    return ScaledEmbeddings(embeddings, divisor=divisor), divisor


def mean_embedding(embeddings: ScaledEmbeddings) -> Floats:
    """Compute the mean of the rows, (d,)."""
    return np.asarray(sum(chunk.sum(axis=0) for _, chunk in embeddings.chunks()) / len(embeddings))


def compact(embeddings: ScaledEmbeddings) -> ScaledEmbeddings:
    """Rotate (N, d) to N dimensions if d is larger by half, which does not change any prediction with an L2 penalty."""
    if embeddings.dimensions < 1.5 * len(embeddings):
        return embeddings
    rows = embeddings.dense()
    values, vectors = np.linalg.eigh(rows @ rows.T)
    return ScaledEmbeddings(vectors * np.sqrt(np.maximum(values, 0)))
