"""The page of one photo: its prediction, heat map, duplicates, review form and history."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flask import Blueprint, Response, request, url_for

from models.artifacts.similarity import DuplicateRow
from models.errors import UserError
from service.context import gallery, image_access
from service.db.errors import RecordNotFoundError
from service.db.facets import load_columns
from service.db.filter import Filter, describe_filter
from service.db.query import PredictionQuery
from service.db.records import PredictionRecord
from service.db.text import encode_file_name
from service.explain.explainer import Explanation
from service.gallery.grid import key_status, render_gallery
from service.gallery.sidebar import filter_from_request, grid_url, open_query, photo_url
from service.http.errors import Problem, problem_from
from service.reviews.decisions import SavedMessage, history_entries, load_history, saved_message
from service.web.layout import problem_page, record_problem

REVIEWER_COOKIE = "reviewer"  # the name that the reviewer entered
AUTO_ADVANCE_COOKIE = "advance"  # whether a save opens the next photo
MAX_NEIGHBORS = 8
MAX_EXPLAIN_CLASSES = 20  # other classes with a link to their heat map, most probable first
RESERVED_KEYS = "bjkntu"  # shortcuts of the page
KEYS = [*"123456789", *(letter for letter in string.ascii_lowercase if letter not in RESERVED_KEYS)]

bp = Blueprint("photo", __name__)
bp.register_error_handler(Problem, problem_page)


@dataclass(frozen=True)
class SimilarImage:
    """A similar image. ``similarity`` is the cosine of the embeddings, or None for a duplicate or near duplicate."""

    name: str
    sha256: str
    label: str
    split: str
    similarity: float | None
    photo: PredictionRecord | None  # where the model was evaluated on it


@dataclass(frozen=True)
class ClassAction:
    """A button that gives the photo a class, and its keyboard shortcut."""

    verb: str
    label: str
    is_predicted: bool
    key: str


@dataclass(frozen=True)
class UndoTarget:
    """The decision that the undo button takes back."""

    id: int
    photo: str
    sha256: str

    @property
    def file(self) -> str:
        return self.photo.rpartition("/")[2]


@dataclass(frozen=True)
class ReviewProgress:
    """How many photos of a view are reviewed, whatever review state the filter selects."""

    reviewed: int
    total: int


@dataclass(frozen=True)
class RejectedReview:
    """A review that was not saved: the reason, and the submitted fields to fill in again."""

    problem: Problem
    params: Mapping[str, str]


@bp.get("/gallery/photo")
def page() -> Response:
    """Show one photo. The filter of the query string determines the photos before and after it."""
    filters = filter_from_request(extra=("photo", "sha256", "explain", "saved", "last"))
    return render_photo_page(
        filters, request.args.get("photo", ""), request.args.get("sha256", ""), explain_class=request.args.get("explain", "")
    )


def render_photo_page(
    filters: Filter, photo: str, sha256: str, *, explain_class: str = "", rejected: RejectedReview | None = None
) -> Response:
    """Render the page of a photo.

    Args:
        filters: The view that the photo was opened from.
        photo: The photo's name.
        sha256: The photo's digest, or empty for any.
        explain_class: The class to show a heat map for, or empty for none.
        rejected: A review that was not saved, shown with its reason.

    Raises:
        Problem: There is no such photo, model or class.
    """
    index = gallery()
    with open_query(filters) as query:
        record = query.find(photo, sha256)
        before, previous, following = query.neighbors(record)
        is_match = query.matches(record)
        first = next(iter(query.first(1)), None)
        neighbors = _neighbors(query, record)
        duplicates = _duplicates(query, record)
        history = load_history(query.connection, record.sha256)
        saved = saved_message(query.connection, request.args.get("saved", ""))
        just_saved = _saved_photo(query, saved)
        copies = query.copies(record)
        columns = load_columns(query.connection, [record.id]).get(record.id, {})
        progress = _progress(query)
        next_unreviewed = _next_unreviewed(query, record) if progress.reviewed < progress.total else None
        if just_saved and just_saved.id != record.id and not query.matches(just_saved):
            previous = just_saved  # it left the filter with its review
        elif previous is None and filters.reviews:
            _, previous, _ = PredictionQuery(query.connection, filters.replace(reviews=()), same_model_as=query).neighbors(
                record
            )
    model = query.model
    trouble = image_access().find_problem(record.photo, record.sha256)
    has_bundle = index.bundle_path(model.version) is not None
    explanation, explain_problem = (
        _explain(model.version, record, explain_class) if explain_class and has_bundle and not trouble else (None, None)
    )
    probabilities = sorted(zip(model.classes, map(float, record.probabilities), strict=True), key=lambda row: -row[1])
    class_keys = dict(zip(model.classes, KEYS, strict=False)) if len(model.classes) <= len(KEYS) else {}
    answer = render_gallery(
        "gallery/photo.html",
        filters=filters,
        model_shown=model,
        photo=record,
        probabilities=probabilities,
        actions=_actions(record, [name for name, _ in probabilities], class_keys),
        all_classes=sorted(model.classes) if len(model.classes) > 2 else [],
        class_keys=class_keys.items(),
        trouble=trouble,
        has_bundle=has_bundle,
        explain_class=explain_class,
        explain_classes=_explain_classes(record, probabilities),
        explanation=explanation,
        explain_problem=explain_problem,
        neighbors=neighbors,
        duplicates=duplicates,
        copies=copies,
        columns=columns,
        warnings=_warnings(record, duplicates),
        history=history_entries(history),
        description=describe_filter(filters, query.counts.total, name=model.name),
        total=query.counts.total,
        progress=progress,
        next_unreviewed=next_unreviewed,
        before=before,
        is_match=is_match,
        previous=previous,
        following=following,
        first=first,
        is_last="last" in request.args,
        saved=saved,
        saved_url=photo_url(filters, just_saved) if just_saved else "",
        undo=_undo_target(record, saved),
        rejected=rejected,
        grid=grid_url(filters, page=min(before, max(0, query.counts.total - 1)) // filters.per_page + 1),
        explain_url=lambda label: f"{url_for('photo.page')}?{_explain_query(filters, record, label)}#explain",
        reviewer=request.cookies.get(REVIEWER_COOKIE, ""),
        auto_advance=request.cookies.get(AUTO_ADVANCE_COOKIE, "1") == "1",
        key=key_status(),
    )
    if rejected:
        answer.status_code = rejected.problem.status
        answer.headers.update({**rejected.problem.headers, "Cache-Control": "no-store"})
        record_problem(rejected.problem)
    return answer


def _saved_photo(query: PredictionQuery, saved: SavedMessage | None) -> PredictionRecord | None:
    """Return the photo that was just reviewed, unless the model has no prediction of it."""
    if saved is None:
        return None
    with contextlib.suppress(RecordNotFoundError):
        return query.find(saved.photo, saved.sha256)
    return None


def _progress(query: PredictionQuery) -> ReviewProgress:
    states = query.counts.facets["review"]
    total = sum(states.values())
    return ReviewProgress(total - states["unreviewed"], total)


def _next_unreviewed(query: PredictionQuery, record: PredictionRecord) -> PredictionRecord | None:
    """Find the next unreviewed photo of the view, or the first where none follows."""
    unreviewed = PredictionQuery(query.connection, query.filters.replace(reviews=("unreviewed",)), same_model_as=query)
    _, _, following = unreviewed.neighbors(record)
    found = following or next(iter(unreviewed.first(1)), None)
    return found if found and found.id != record.id else None


def _undo_target(record: PredictionRecord, saved: SavedMessage | None) -> UndoTarget | None:
    """Choose what the undo button takes back: the last save, otherwise the review of this photo.

    After an undo there is nothing more to take back, so that a second click at the same place does nothing.
    """
    if saved and saved.undo:
        return UndoTarget(saved.undo, saved.photo, saved.sha256)
    if record.decision is None or (saved and saved.is_undo):
        return None
    return UndoTarget(record.decision.id, record.photo, record.sha256)


def _explain(version: str, record: PredictionRecord, label: str) -> tuple[Explanation | None, Problem | None]:
    """Explain a class, or return the problem to show in place of the heat map. Raises Problem for an unknown class."""
    try:
        return image_access().explain(version, record.photo, record.sha256, label), None
    except UserError as error:
        problem = problem_from(error)
        if problem is None or problem.code == "bad_parameter":
            raise
        return None, problem.without_traceback()


def _actions(record: PredictionRecord, by_probability: Sequence[str], keys: Mapping[str, str]) -> list[ClassAction | None]:
    """Choose the classes of the two buttons, whose meaning stays the same from photo to photo.

    The first button accepts the label, or the prediction of a photo that came without a label. The second one changes to
    the prediction. With two classes it changes to the other one; with more it is empty where the label was predicted.
    What was decided about the photo does not move them.
    """
    predicted = record.predicted
    runner_up = next((name for name in by_probability if name != predicted), None)
    if record.source == "production":
        first, second, verbs = predicted, runner_up, ("Label as", "Label as")
    else:
        first = record.label or predicted
        second = predicted if predicted != first else runner_up if len(by_probability) == 2 else None
        verbs = ("Keep label", "Change to")
    return [
        ClassAction(verb, name, name == predicted, keys.get(name, "")) if name else None
        for verb, name in zip(verbs, (first, second), strict=True)
    ]


def _explain_classes(record: PredictionRecord, probabilities: Sequence[tuple[str, float]]) -> tuple[list[str], list[str]]:
    """Return the classes to explain: the prediction and the label, then the most probable others."""
    foremost = list(dict.fromkeys(name for name in (record.predicted, record.label) if name))
    return foremost, [name for name, _ in probabilities if name not in foremost][:MAX_EXPLAIN_CLASSES]


def _neighbors(query: PredictionQuery, record: PredictionRecord) -> list[SimilarImage]:
    """Find the evaluated photos with the most similar embeddings."""
    for table in gallery().similarity_tables(query.model.version):
        if record.sha256 in table.sha256s:
            near = table.nearest(table.sha256s.index(record.sha256), MAX_NEIGHBORS)
            known = query.fetch_by_sha256([table.sha256s[row] for row, _ in near])
            return [
                SimilarImage(other.photo, other.sha256, other.label or "", other.split, similarity, other)
                for row, similarity in near
                if (other := known.get(table.sha256s[row]))
            ]
    return []


def _duplicates(query: PredictionQuery, record: PredictionRecord) -> list[SimilarImage]:
    """Find the exact and near duplicates in all splits of the dataset."""
    groups: dict[str, DuplicateRow] = {}
    for table in gallery().similarity_tables(query.model.version):
        groups |= {
            other.photo: other for other in table.duplicates_of(record.sha256) if encode_file_name(other.photo) != record.photo
        }
    return [
        SimilarImage(name, other.sha256, other.label, other.split, None, _evaluated(query, name, other.sha256))
        for other in groups.values()
        if (name := encode_file_name(other.photo))
    ]


def _evaluated(query: PredictionQuery, name: str, sha256: str) -> PredictionRecord | None:
    """Return the prediction of a name. Copies under other names have the same sha256."""
    with contextlib.suppress(RecordNotFoundError):
        return query.find(name, sha256)
    return None


def _warnings(record: PredictionRecord, duplicates: Sequence[SimilarImage]) -> list[str]:
    """Describe label conflicts and leaks between splits among the duplicates."""
    warnings = []
    if labels := sorted({other.label for other in duplicates if record.label and other.label != record.label}):
        warnings.append(f"Label conflict: this photo is labeled {record.label}, a duplicate {' or '.join(labels)}.")
    if record.split and (splits := sorted({other.split for other in duplicates if other.split != record.split})):
        warnings.append(
            f"Leak between splits: this photo is in {record.split}, a duplicate in {' and '.join(splits)}. "
            "This makes the evaluation too optimistic."
        )
    return warnings


def _explain_query(filters: Filter, record: PredictionRecord, label: str) -> str:
    return filters.query(photo=record.photo, sha256=record.sha256, explain=label)
