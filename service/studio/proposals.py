"""Proposals of the active model for photos without a class, the ones it is least sure of first."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from models.errors import UserError
from service.context import Services
from service.http.errors import Problem
from service.inference.batcher import InferenceResult
from service.studio import background_tasks
from service.studio.data_sets import UNLABELED, DataSet, Photo

BATCH = 4
DEADLINE_S = 60.0  # of a batch, which waits behind requests
PAUSE_S = 1.0  # while the server is at capacity
UNSURE = 0.5  # a smaller margin between the two most probable classes is worth a label


@dataclass(frozen=True)
class Proposal:
    """The most probable class of a photo, its probability, and the margin to the second one."""

    label: str
    probability: float
    margin: float

    @property
    def is_unsure(self) -> bool:
        return self.margin < UNSURE


def propose(data_set: DataSet, app: Services) -> None:
    """Classify the photos without a class with the active model, in the background.

    Raises:
        Problem: The model knows none of the classes, or the data set is busy.
    """
    classes = app.model_manager.get().bundle.classes
    if not set(classes) & set(data_set.classes()):
        raise Problem(
            "bad_parameter",
            f"The active model knows {', '.join(classes[:6])}, and no class of {data_set.name}. Label some photos, train, and"
            " put the new model live. Then it can suggest classes.",
        )
    background_tasks.start(data_set, "prediction", lambda report: _propose(data_set, app, report))


def read_proposals(data_set: DataSet) -> dict[str, Proposal]:
    """Return the proposals by the path of their photo. Classes that the data set does not have are not proposed."""
    rows = data_set.read_state("proposals.json", {})
    known = set(data_set.classes())
    return {path: proposal for path, row in rows.items() if (proposal := Proposal(*row)).label in known}


def most_useful_first(photos: list[Photo], proposals: dict[str, Proposal]) -> list[Photo]:
    """Sort photos: the least certain first, and photos without a proposal last."""
    return sorted(photos, key=lambda photo: (proposals[photo.path].margin if photo.path in proposals else 2.0, photo.path))


def _propose(data_set: DataSet, app: Services, report: background_tasks.Report) -> str:
    photos = data_set.photos_of(UNLABELED)
    rows: dict[str, tuple[str, float, float]] = {}
    for first in range(0, len(photos), BATCH):
        report("Classifying the photos", first, len(photos))
        batch = {}
        for photo in photos[first : first + BATCH]:
            try:
                batch[photo.path] = data_set.find_photo(photo.path).read_bytes()
            except UserError:  # labeled meanwhile
                continue
        results = zip(batch, _predict(app, list(batch.values())), strict=True)
        rows |= {path: result for path, result in results if isinstance(result, tuple)}
    data_set.write_state("proposals.json", rows)
    unsure = sum(Proposal(*row).is_unsure for row in rows.values())
    return f"The model is unsure about {unsure:,} of {len(rows):,} photos. Label these first."


def _predict(app: Services, images: list[bytes]) -> list[tuple[str, float, float] | Problem]:
    """Predict images with the model that is active now. Waits while the server is at capacity."""
    while True:
        try:
            app.admission.acquire(len(images))
            break
        except Problem:
            time.sleep(PAUSE_S)
    try:
        deadline = time.perf_counter() + DEADLINE_S
        model, results = app.predictor.predict(images, deadline=deadline, is_cancelled=lambda: False)
    except TimeoutError:
        raise UserError("The server is too busy to classify the photos. Try again later.") from None
    finally:
        app.admission.release(len(images))
    return [_row(result, model.bundle.classes) if isinstance(result, InferenceResult) else result for result in results]


def _row(result: InferenceResult, classes: tuple[str, ...]) -> tuple[str, float, float]:
    second, first = np.sort(result.probabilities)[-2:]
    return classes[result.top_class], float(first), float(first - second)
