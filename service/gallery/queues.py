"""The landing page's queues: what is worth looking at first, each a filter like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.db.filter import Filter

SEED = 1
MAX_CLASS_QUEUES = 20  # with a queue of their own


@dataclass(frozen=True)
class ReviewQueue:
    """``description`` says what a person gains by looking; ``empty_text`` what it means that there is nothing."""

    title: str
    description: str
    empty_text: str
    filters: Filter


def review_queues(version: str, classes: Sequence[str]) -> list[ReviewQueue]:
    """In the order in which they repay looking."""
    everything = Filter(model=version)
    wrong, right = everything.replace(outcomes=("incorrect",)), everything.replace(outcomes=("correct",))
    return [
        ReviewQueue(
            "Confidently wrong",
            "The mistakes that speak most against their label first: look whether it is the label that is wrong.",
            "The model has nothing wrong.",
            wrong,
        ),
        ReviewQueue(
            "Probably mislabelled",
            "Photos whose probabilities fit another class better than the photos of that class themselves do.",
            "Nothing looks mislabelled. With `finetune evaluate --folds 5` the training photos are looked through as well.",
            everything.replace(flags=("mislabeled",)),
        ),
        ReviewQueue(
            "Least certain",
            "The closest calls, right or wrong: more photos like these teach the model most.",
            "There are no predictions yet.",
            everything.replace(sort="margin"),
        ),
        ReviewQueue(
            "Same photo, another label",
            "Photos that look like one with another label; one of the two labels is wrong.",
            "No two photos that look the same have different labels.",
            everything.replace(flags=("duplicate",)),
        ),
        ReviewQueue(
            "Live, not yet reviewed",
            "What people sent to be classified, the least certain first; label some, and train with them.",
            "None wait. With SAVE_PREDICTIONS=1 photos that are sent to /predict are kept, and come here.",
            everything.replace(sources=("production",), reviews=("unreviewed",), sort="margin"),
        ),
        ReviewQueue("Random incorrect", "A fair sample of the mistakes.", "The model has nothing wrong.", _random(wrong)),
        ReviewQueue("Random correct", "A fair sample of what it gets right.", "The model has nothing right.", _random(right)),
        *(
            ReviewQueue(
                f"Most confident: {name}",
                f"What the model takes for the clearest {name}.",
                f"Nothing was called {name}.",
                everything.replace(predicted=(name,), sort="confidence"),
            )
            for name in classes[:MAX_CLASS_QUEUES]
        ),
    ]


def _random(filters: Filter) -> Filter:
    return filters.replace(sort="random", seed=SEED)
