"""The OOD score: how unlike the training images an image is. OOD stands for out of distribution.

The score is the Mahalanobis distance of the image's embedding, scaled to unit length, to the nearest class mean, with one
covariance for all classes (Lee et al. 2018, https://arxiv.org/abs/1807.03888). The covariance is that of the differences from
the class means: its largest principal components, and the same variance in all other directions. The parameters therefore
take (components + classes) x dimensions numbers however many images there are, and a class may have few images.

The score is divided by the square root of the number of dimensions, so a typical training image scores about 1.

The serving graph computes the same (``models.networks.onnx_export``). This module does not import torch.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError

OOD_FILE = "ood.npz"
OOD_SCORES_FILE = "ood_scores.npz"
OOD_SCORE = "ood_score"
CHUNK_ROWS = 4096  # bounds the memory


@dataclass(frozen=True, eq=False)
class OODParameters:
    """The parameters of the score for embeddings of d dimensions.

    Attributes:
        center: (d,) float32, subtracted from the embedding of unit length.
        directions: (k + C, d) float32: the k principal components as unit vectors, then the C class means minus ``center``.
        variances: (k,) float32 variance along each component.
        other_variance: () float32 variance along every other direction.
    """

    center: NDArray[np.float32]
    directions: NDArray[np.float32]
    variances: NDArray[np.float32]
    other_variance: NDArray[np.float32]

    @property
    def num_components(self) -> int:
        return len(self.variances)

    @property
    def num_bytes(self) -> int:
        return sum(int(getattr(self, field.name).nbytes) for field in fields(self))

    @property
    def coordinates(self) -> NDArray[np.float32]:
        """(C, k) the class means along the components."""
        means = self.directions[self.num_components :]
        return means @ self.directions[: self.num_components].T

    @property
    def squared_norms(self) -> NDArray[np.float32]:
        """(C,) the squared length of each class mean."""
        return np.asarray((self.directions[self.num_components :] ** 2).sum(axis=1), dtype=np.float32)

    def scores(self, embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Compute the score of each embedding: (N, ...) -> (N,)."""
        chunks = [self._chunk_scores(embeddings[i : i + CHUNK_ROWS]) for i in range(0, len(embeddings), CHUNK_ROWS)]
        return np.concatenate(chunks) if chunks else np.empty(0, np.float32)

    def _chunk_scores(self, embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        flat = embeddings.reshape(len(embeddings), -1).astype(np.float64)
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        centered = flat / np.maximum(norms, 1e-12) - self.center
        k, dimensions = self.num_components, len(self.center)
        projected = centered @ self.directions.T.astype(np.float64)
        components, along_means = projected[:, :k], projected[:, k:]
        lengths = (centered**2).sum(axis=1)
        best = np.full(len(flat), np.inf)
        for mean, squared_norm, along in zip(self.coordinates, self.squared_norms, along_means.T, strict=True):
            squares = (components - mean) ** 2
            rest = np.maximum(lengths - 2 * along + squared_norm - squares.sum(axis=1), 0)
            best = np.minimum(best, (squares / self.variances).sum(axis=1) + rest / self.other_variance)
        return np.asarray(np.sqrt(best / dimensions), dtype=np.float32)

    def write(self, path: Path) -> None:
        """Write the parameters."""
        np.savez_compressed(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def read(cls, path: Path) -> OODParameters:
        """Read a file of ``write``. Raises BundleError if it is malformed."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                parameters = cls(*(arrays[field.name] for field in fields(cls)))
            k, dimensions = parameters.num_components, len(parameters.center)
            shape = parameters.directions.shape
            if len(shape) != 2 or shape[1] != dimensions or shape[0] <= k:
                raise ValueError(f"directions of shape {shape} for {k} variances and {dimensions} dimensions")
            return parameters
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None


@dataclass(frozen=True, eq=False)
class HeldOutOODScores:
    """Scores of images that the parameters were not fit to, from which another limit can be chosen. 4 bytes per image.

    Attributes:
        in_distribution: (N,) float32, of images of the classes.
        neither: The scores of images of none of the classes, by their folder.
        groups: (N,) the number of the group of each image of the classes; None if they are independent.
    """

    in_distribution: NDArray[np.float32]
    neither: Mapping[str, NDArray[np.float32]]
    groups: NDArray[np.int64] | None = None

    def write(self, path: Path) -> None:
        """Write the scores, the ones of the classes in ascending order."""
        order = np.argsort(self.in_distribution, kind="stable")
        names, scores = list(self.neither), list(self.neither.values())
        np.savez_compressed(
            path,
            in_distribution=self.in_distribution[order],
            groups=np.empty(0, np.int32) if self.groups is None else self.groups[order].astype(np.int32),
            neither=np.concatenate(scores) if scores else np.empty(0, np.float32),
            folders=np.array(names, dtype=np.str_),
            folder_sizes=np.array([len(own) for own in scores], dtype=np.int64),
        )

    @classmethod
    def read(cls, path: Path) -> HeldOutOODScores:
        """Read a file of ``write``. Raises BundleError if it is malformed."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                ends = np.cumsum(arrays["folder_sizes"])
                scores = np.split(arrays["neither"], ends[:-1]) if len(ends) else []
                neither = dict(zip(arrays["folders"].tolist(), scores, strict=True))
                groups = arrays["groups"].astype(np.int64)
                return cls(arrays["in_distribution"], neither, groups if len(groups) else None)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


def _unreadable(path: Path, error: Exception) -> BundleError:
    reason = " ".join(str(error).split())[:160]
    return BundleError(f"{path} cannot be read as an OOD score ({reason}). Export the bundle again.")
