"""Capture embeddings, and build the similarity index of an evaluation: compact embeddings and groups of duplicates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.data.duplicates import find_duplicates
from finetune.data.inspection import ImageRecord
from models.artifacts.similarity import DuplicateRow, SimilarityIndex
from models.networks.classifier import Classifier
from models.networks.spec import ModelSpec

MAX_DIMENSIONS = 64


@contextlib.contextmanager
def capture_embeddings(classifier: Classifier, spec: ModelSpec) -> Iterator[list[NDArray[np.float32]]]:
    """Collect the head's inputs during the block: one (n, d) array per batch, equal to the served graph's embeddings."""
    batches: list[NDArray[np.float32]] = []

    def collect(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        embedding = inputs[0].detach().float()
        batches.append((embedding.mean((2, 3)) if isinstance(layer, nn.Conv2d) else embedding).cpu().numpy())

    handle = classifier.net.get_submodule(spec.head).register_forward_pre_hook(collect)
    try:
        yield batches
    finally:
        handle.remove()


def build_similarity_index(
    sha256s: Sequence[str], embeddings: NDArray[np.floating[Any]], records: Sequence[ImageRecord], classes: Sequence[str]
) -> SimilarityIndex:
    """Build the similarity index.

    Args:
        sha256s: The sha256 of each evaluated image.
        embeddings: Their embeddings, (N, d).
        records: The images to search for duplicates; may include others, such as the training images.
        classes: Class names, in the order of the labels.
    """
    duplicates = [
        DuplicateRow(number, s.sample.name, classes[s.sample.label], s.sample.split, s.sha256)
        for number, group in enumerate(find_duplicates(records), start=1)
        for s in group
    ]
    return SimilarityIndex(tuple(sha256s), reduce_dimensions(embeddings), tuple(duplicates))


def reduce_dimensions(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """Reduce embeddings to at most 64 dimensions by PCA and normalize them to unit length: (N, d) -> (N, min(64, N, d)).

    After PCA, cosine similarities approximate those of the full embeddings with their mean subtracted.
    """
    from sklearn.decomposition import PCA  # imported here because it takes a second

    reduced = embeddings.reshape(len(embeddings), -1).astype(np.float64)
    dimensions = min(MAX_DIMENSIONS, *reduced.shape)
    if dimensions < reduced.shape[1] and len(reduced) > 1:
        with np.errstate(invalid="ignore"):  # the explained variance ratio is 0/0 if all images are the same
            reduced = PCA(n_components=dimensions, random_state=0).fit_transform(reduced)
    norms = np.linalg.norm(reduced[:, :dimensions], axis=1, keepdims=True)
    return (reduced[:, :dimensions] / np.where(norms > 0, norms, 1)).astype(np.float16)
