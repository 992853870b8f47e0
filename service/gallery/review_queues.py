"""The review queues of the gallery's landing page. Each is a filter with a title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import list_names
from service.db.facets import ODD_FILE, FacetValue
from service.db.filter import Filter
from service.db.query import PredictionQuery
from service.db.records import ModelRecord, PredictionRecord

SEED = 1


@dataclass(frozen=True)
class ReviewQueue:
    """A filter with the reason to review its photos, and the text to show if it has none."""

    title: str
    description: str
    empty_text: str
    filters: Filter

    @property
    def remaining(self) -> Filter:
        """The part of the queue that is not reviewed yet."""
        return self.filters.replace(reviews=("unreviewed",))


@dataclass(frozen=True)
class QueuePreview:
    """A queue with its counts and its first photos, unreviewed ones if there are any. ``filters`` matches these photos."""

    queue: ReviewQueue
    total: int
    reviewed: int
    photos: list[PredictionRecord]
    filters: Filter

    @classmethod
    def load(cls, queue: ReviewQueue, everything: PredictionQuery, *, size: int) -> QueuePreview:
        """Count a queue and load its first photos.

        Args:
            queue: The queue.
            everything: A query of all photos of the same model.
            size: The max number of photos.
        """
        remaining = PredictionQuery(everything.connection, queue.remaining, same_model_as=everything)
        reviews = remaining.counts.facets["review"]  # counts the complete queue, as a facet ignores its own values
        total, unreviewed = reviews.total(), reviews["unreviewed"]
        query = remaining
        if not unreviewed and queue.filters != queue.remaining:
            query = PredictionQuery(everything.connection, queue.filters, same_model_as=everything)
        return cls(queue, total, total - unreviewed, query.first(size), query.filters)


def review_queues(version: str) -> list[ReviewQueue]:
    """Return the queues of a model, the most useful first."""
    everything = Filter(model=version)
    incorrect, correct = everything.replace(outcomes=("incorrect",)), everything.replace(outcomes=("correct",))
    return [
        ReviewQueue(
            "Mistakes, highest loss first",
            "Check whether the label is wrong.",
            "No mistakes.",
            incorrect,
        ),
        ReviewQueue(
            "Possible label errors",
            "Photos that look more like another class than like their own (confident learning).",
            "No suspicious labels. Run `finetune evaluate --folds 5` to check training photos too.",
            everything.replace(flags=("mislabeled",)),
        ),
        ReviewQueue(
            "Least certain",
            "The model's closest calls. Adding similar photos helps most.",
            "There are no predictions yet.",
            everything.replace(sort="margin"),
        ),
        ReviewQueue(
            "Near duplicates with different labels",
            "Photos that look the same as one with another label. One of the two labels is wrong.",
            "No near duplicates with different labels.",
            everything.replace(flags=("duplicate",)),
        ),
        ReviewQueue(
            "Unlike the training photos",
            "Outliers: photos that get no label, the least similar first. Mark the ones that show none of the classes.",
            "No photos are unlike the training photos.",
            everything.replace(flags=("unlike",), sort="outlier"),
        ),
        ReviewQueue(
            "Production photos",
            "Photos sent to /predict, least certain first. Label some and train with them.",
            "No production photos to review. Set SAVE_PREDICTIONS=1 to store photos sent to /predict.",
            everything.replace(sources=("production",), sort="margin"),
        ),
        ReviewQueue("Random sample of mistakes", "Mistakes in random order.", "No mistakes.", _random(incorrect)),
        ReviewQueue(
            "Random sample of correct predictions",
            "Correct predictions in random order.",
            "No correct predictions.",
            _random(correct),
        ),
    ]


def odd_file_queue(version: str, values: Sequence[FacetValue]) -> ReviewQueue:
    """Return the queue of odd files, whose kinds are values of a facet."""
    kinds = [value for value in values if value.column == ODD_FILE]
    return ReviewQueue(
        "Odd files",
        f"{list_names([kind.value for kind in kinds]).capitalize()}. Exclude what training should not see.",
        "No odd files.",
        Filter(model=version, facets=tuple(kind.key for kind in kinds)).replace(sort="margin"),
    )


def disagreement_queue(version: str, other: ModelRecord) -> ReviewQueue:
    """Return the queue of the photos that another model predicted differently."""
    return ReviewQueue(
        "Two models disagree",
        f"Photos that {other.name} ({other.version}) predicted differently. At least one of the two is wrong.",
        f"{other.name} ({other.version}) predicts the same.",
        Filter(model=version, baseline=other.version, change="disagree").replace(sort="margin"),
    )


def production_queue(model: ModelRecord) -> ReviewQueue:
    """Return the queue of the unreviewed production photos that another model than the active one predicted."""
    return ReviewQueue(
        f"Production photos predicted by {model.name} ({model.version})",
        "Photos sent to /predict while this model was active, least certain first.",
        "No production photos to review.",
        Filter(model=model.version, sources=("production",)).replace(sort="margin"),
    )


def most_confident(version: str, class_name: str) -> Filter:
    """Return the filter of the photos predicted as a class, most confident first."""
    return Filter(model=version, predicted=(class_name,), sort="confidence")


def _random(filters: Filter) -> Filter:
    return filters.replace(sort="random", seed=SEED)
