"""Suggest classes for photos without one with the active model, and order the photos by how much their labels help.

A label helps most if the model is uncertain, and no similar photo has been labeled. So the photos with the smallest margins
come first, in the order of greedy k-center on their embeddings (Sener and Savarese 2018, https://arxiv.org/abs/1708.00489).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from models.artifacts.bundle import GRAPH, Bundle
from models.artifacts.paths import compiled_dir
from models.errors import UserError
from models.runtime.openvino_engine import OpenVINOEngine
from service.context import Services
from service.http.errors import Problem
from service.inference.image_decoder import ImageDecoder
from service.studio import background_tasks
from service.studio.data_sets import UNLABELED, DataSet, Photo

BATCH = 4
UNSURE = 0.5  # a smaller margin between the two most probable classes is worth a label
MAX_SPREAD = 600  # the photos that the model is least sure of are ordered by their embeddings, the others by their margins


@dataclass(frozen=True)
class Suggestion:
    """The most probable class of a photo, its probability, and the margin to the second one."""

    label: str
    probability: float
    margin: float

    @property
    def is_unsure(self) -> bool:
        return self.margin < UNSURE


def suggest(data_set: DataSet, app: Services) -> None:
    """Classify the photos without a class with the active model, in the background at low priority.

    Raises:
        Problem: The model knows none of the classes, or the dataset is busy.
    """
    bundle, decoder = app.model_manager.get().bundle, app.model_manager.decoder
    if not set(bundle.classes) & set(data_set.classes()):
        raise Problem(
            "bad_parameter",
            f"The active model knows {', '.join(bundle.classes[:6])}, and no class of {data_set.name}. Label some photos, "
            "train, and put the new model live. Then it can suggest classes.",
        )

    def work(report: background_tasks.Report) -> str:
        suggestions = classify(bundle, decoder, _read(data_set, report))
        data_set.write_state("suggestions.json", {path: astuple(suggestion) for path, suggestion in suggestions.items()})
        unsure = sum(suggestion.is_unsure for suggestion in suggestions.values())
        return f"The model is unsure about {unsure:,} of {len(suggestions):,} photos. Label these first."

    background_tasks.start(data_set, "classification", work)


def read_suggestions(data_set: DataSet) -> dict[str, Suggestion]:
    """Return the suggestions by the path of their photo, the most useful first, without classes that the dataset lacks."""
    rows = data_set.read_state("suggestions.json", {})
    known = set(data_set.classes())
    return {path: suggestion for path, row in rows.items() if (suggestion := Suggestion(*row)).label in known}


def most_useful_first(photos: list[Photo], suggestions: Mapping[str, Suggestion]) -> list[Photo]:
    """Sort photos as their suggestions are, and photos without a suggestion last."""
    rank = {path: number for number, path in enumerate(suggestions)}
    return sorted(photos, key=lambda photo: (rank.get(photo.path, len(rank)), photo.path))


def classify(bundle: Bundle, decoder: ImageDecoder, photos: Iterable[tuple[str, bytes]]) -> dict[str, Suggestion]:
    """Classify photos, and order them by how much their labels help. Photos that cannot be decoded are left out.

    Args:
        bundle: The model. It is compiled here, so that requests do not wait for the photos.
        decoder: Decodes the photos.
        photos: The path and the file of each photo.

    Returns:
        The suggestion of each photo by its path: the most useful first.
    """
    # The threads of OpenVINO inherit the low priority of this thread.
    engine = OpenVINOEngine(
        bundle.path / GRAPH, outputs=("probabilities", "embedding"), batch_sizes=(BATCH,), cache_dir=compiled_dir()
    )
    suggestions: dict[str, Suggestion] = {}
    embeddings: dict[str, NDArray[np.float32]] = {}  # of the photos that the model is least sure of
    for paths, pixels in _batches(bundle, decoder, photos):
        for path, probabilities, embedding in zip(paths, *engine.run(pixels), strict=True):
            second, first = np.sort(probabilities)[-2:]
            label = bundle.classes[int(probabilities.argmax())]
            suggestions[path] = suggestion = Suggestion(label, float(first), float(first - second))
            if suggestion.is_unsure:
                embeddings[path] = embedding.ravel()
        if len(embeddings) > 2 * MAX_SPREAD:  # limits the memory
            embeddings = {path: embeddings[path] for path in _least_sure(embeddings, suggestions)}
    candidates = _least_sure(embeddings, suggestions)
    first_paths = [candidates[row] for row in spread_out(np.array([embeddings[path] for path in candidates]))]
    rest = sorted(suggestions.keys() - set(first_paths), key=lambda path: (suggestions[path].margin, path))
    return {path: suggestions[path] for path in (*first_paths, *rest)}


def spread_out(embeddings: NDArray[np.float32]) -> list[int]:
    """Order the rows so that each one is the least similar to all rows before it. The first row stays the first."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    similarity = np.full(len(unit), -np.inf)  # with the most similar row of the result
    order: list[int] = []
    while len(order) < len(unit):
        row = int(similarity.argmin())
        order.append(row)
        similarity = np.maximum(similarity, unit @ unit[row])
        similarity[row] = np.inf
    return order


def _least_sure(paths: Iterable[str], suggestions: Mapping[str, Suggestion]) -> list[str]:
    return sorted(paths, key=lambda path: (suggestions[path].margin, path))[:MAX_SPREAD]


def _read(data_set: DataSet, report: background_tasks.Report) -> Iterator[tuple[str, bytes]]:
    photos = data_set.photos_of(UNLABELED)
    for number, photo in enumerate(photos):
        report("Classifying the photos", number, len(photos))
        try:
            data = data_set.find_photo(photo.path).read_bytes()
        except (UserError, FileNotFoundError):  # labeled meanwhile
            continue
        yield photo.path, data


def _batches(
    bundle: Bundle, decoder: ImageDecoder, photos: Iterable[tuple[str, bytes]]
) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Yield the paths and the decoded pixels (N, H, W, C) of up to BATCH photos."""
    paths: list[str] = []
    pixels: list[NDArray[np.uint8]] = []
    for path, data in photos:
        try:
            pixels.append(decoder.preprocess(data, bundle.preprocessing).pixels)
        except UserError:
            continue
        paths.append(path)
        if len(paths) == BATCH:
            yield paths, np.stack(pixels)
            paths, pixels = [], []
    if paths:
        yield paths, np.stack(pixels)
