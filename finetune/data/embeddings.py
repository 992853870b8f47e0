"""Which photos look alike, for those who review predictions: embeddings made small, and duplicates by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from finetune.data.duplicates import find_duplicates
from finetune.data.inspection import ImageRecord
from models.artifacts.similarity import DuplicateRow, SimilarityIndex
from models.networks.classifier import Classifier
from models.networks.spec import ModelSpec

MAX_DIMENSIONS = 64


@contextlib.contextmanager
def capture_embeddings(classifier: Classifier, spec: ModelSpec) -> Iterator[list[NDArray[np.float32]]]:
    """Collect the head's input of every batch that passes it inside the block, (n, d) each, as the served graph gives it."""
    seen: list[NDArray[np.float32]] = []

    def keep(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        embedding = given[0].detach().float()
        seen.append((embedding.mean((2, 3)) if isinstance(layer, nn.Conv2d) else embedding).cpu().numpy())

    handle = classifier.net.get_submodule(spec.head).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def build_similarity_index(
    sha256s: Sequence[str], embeddings: NDArray[np.floating[Any]], records: Sequence[ImageRecord], classes: Sequence[str]
) -> SimilarityIndex:
    """What looks alike: ``embeddings`` (N, d) of the evaluated photos, and the duplicates among ``records`` of more of them."""
    duplicates = [
        DuplicateRow(number, s.sample.name, classes[s.sample.label], s.sample.split, s.sha256)
        for number, group in enumerate(find_duplicates(records), start=1)
        for s in group
    ]
    return SimilarityIndex(tuple(sha256s), reduce_dimensions(embeddings), tuple(duplicates))


def reduce_dimensions(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """At most 64 numbers of unit length for each photo, by principal components where there are more: (N, d) -> (N, min(...)).

    A cosine between them is near the cosine between the whole embeddings, less what all photos have in common.
    """
    small = embeddings.reshape(len(embeddings), -1).astype(np.float64)
    numbers = min(MAX_DIMENSIONS, *small.shape)
    if numbers < small.shape[1] and len(small) > 1:
        with np.errstate(invalid="ignore"):  # the share of variance that each explains, where all photos are the same
            small = PCA(n_components=numbers, random_state=0).fit_transform(small)
    lengths = np.linalg.norm(small[:, :numbers], axis=1, keepdims=True)
    return (small[:, :numbers] / np.where(lengths > 0, lengths, 1)).astype(np.float16)
