"""Estimate the time of a training run from the measured speed of earlier ones."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.context import gallery, services, workspace
from service.db.training_jobs import FINISHED, list_jobs
from service.http.errors import Problem
from service.studio.data_sets import DataSet
from service.studio.data_source import DATASET
from service.studio.job_progress import estimate_s
from service.studio.training_settings import UNFROZEN_FIELDS, chosen_head


@dataclass(frozen=True)
class Estimate:
    """How long a training run will probably take, and the run that was measured."""

    seconds: float
    run: str


def estimate_run(settings: Mapping[str, Any], data: str) -> Estimate | None:
    """Estimate the time of a run from the last ones with the same network and head, on the same data if there is one.

    Args:
        settings: The result of ``parse_settings``.
        data: How the form names the data.

    Returns:
        The estimate, or None if no such run was measured, or the number of photos is not known.
    """
    with gallery().database.read() as connection:
        finished = [job for job in list_jobs(connection, FINISHED) if job.speed]
    similar = [job for job in finished if _kind(job.settings) == _kind(settings)]
    data_set = find_data_set_of(data)
    images = data_set.usage()[1] if data_set else 0
    if not similar or not images:
        return None
    same = [job for job in similar if job.data == data]
    measured = same[0] if same else max(similar, key=lambda job: (job.speed or {})["reading_s_per_image"])
    assert measured.speed
    return Estimate(estimate_s(measured.speed, images=images, epochs=settings.get("epochs")), measured.run)


def find_data_set_of(data: str) -> DataSet | None:
    """Return the dataset of the studio that a form names, or None for a folder below DATA_DIR."""
    with contextlib.suppress(Problem):
        if data.startswith(DATASET):
            return DataSet.find(workspace(), services().settings, data.removeprefix(DATASET))
    return None


def _kind(settings: Mapping[str, Any]) -> tuple[Any, str, bool]:
    """Return what runs must have in common: network, head, and whether every epoch runs the complete network."""
    return settings.get("backbone"), chosen_head(settings), any(name in settings for name in UNFROZEN_FIELDS)
