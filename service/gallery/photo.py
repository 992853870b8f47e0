"""A photo's page: what it is, what the model said and why, what it looks like, what was decided, and what comes next."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, request, url_for

from models.artifacts.similarity import DuplicateRow
from service.context import gallery, image_access, services
from service.db.filter import Filter, describe_filter
from service.db.ingest import encode_file_name
from service.db.query import PredictionQuery, PredictionRecord
from service.explain.explainer import Explanation
from service.gallery.grid import render_gallery
from service.gallery.sidebar import filter_from_request, grid_url, open_query
from service.http.errors import Problem
from service.http.security import require_key_or_cookie
from service.reviews.decisions import load_history
from service.reviews.history import history_entries, saved_message
from service.web.layout import problem_page, record_problem

REVIEWER_COOKIE = "reviewer"  # the name that the reviewer entered
AUTO_ADVANCE_COOKIE = "advance"  # whether a save opens the next photo
MAX_NEIGHBORS = 8
MAX_EXPLAIN_CLASSES = 20  # classes that one can look for by a link, the most probable ones
RESERVED_KEYS = "bjkntu"  # keys of the page that are no class's
KEYS = [*"123456789", *(letter for letter in string.ascii_lowercase if letter not in RESERVED_KEYS)]
MAX_CLASS_BUTTONS = 8  # with a button each, where there are more classes than keys

bp = Blueprint("photo", __name__)


@dataclass(frozen=True)
class SimilarImage:
    """A photo that looks like another: by its ``similarity`` (cosine of the embeddings), or the same to byte or eye (None)."""

    name: str
    sha256: str
    label: str
    split: str
    similarity: float | None
    photo: PredictionRecord | None  # where the model was evaluated on it


@dataclass(frozen=True)
class RejectedReview:
    """A decision that was not saved: why, and the fields that came, so that nobody types them again."""

    problem: Problem
    params: Mapping[str, str]


@bp.errorhandler(Problem)
def say(problem: Problem) -> Response:
    return problem_page(problem)


@bp.get("/gallery/photo")
def page() -> Response:
    """One photo under the filter that one came with, which says what comes before and after it."""
    filters = filter_from_request(extra=("photo", "sha256", "explain", "saved", "last"))
    return render_photo_page(
        filters, request.args.get("photo", ""), request.args.get("sha256", ""), explain_class=request.args.get("explain", "")
    )


def render_photo_page(
    filters: Filter, photo: str, sha256: str, *, explain_class: str = "", rejected: RejectedReview | None = None
) -> Response:
    """The page of a photo; with what was ``refused`` on top of it. Raises Problem."""
    shown = gallery()
    with open_query(filters) as found:
        this = found.find(photo, sha256)
        before, previous, following = found.neighbors(this)
        is_in = found.matches(this)
        first = next(iter(found.first(1)), None)
        neighbours = _neighbours(found, this)
        duplicates = _duplicates(found, this)
        past = load_history(found.connection, this.sha256)
        just_saved = saved_message(found.connection, request.args.get("saved", ""))
    model = found.model
    trouble = image_access().find_problem(this.photo, this.sha256)
    has_bundle = shown.bundle_path(model.version) is not None
    explanation, no_look = (
        _explain(model.version, this, explain_class) if explain_class and has_bundle and not trouble else (None, None)
    )
    probabilities = sorted(zip(model.classes, map(float, this.probabilities), strict=True), key=lambda row: -row[1])
    answer = render_gallery(
        "gallery/photo.html",
        filters=filters,
        judge=model,
        photo=this,
        probabilities=probabilities,
        choices=_choices(model.classes, this, probabilities),
        trouble=trouble,
        has_bundle=has_bundle,
        explain_class=explain_class,
        looks=_looks(this, probabilities),
        explanation=explanation,
        no_look=no_look,
        neighbours=neighbours,
        duplicates=duplicates,
        warnings=_warnings(this, duplicates),
        history=history_entries(past),
        said=describe_filter(filters, found.counts.total, name=model.name),
        total=found.counts.total,
        before=before,
        is_in=is_in,
        previous=previous,
        following=following,
        first=first,
        is_last="last" in request.args,
        saved=just_saved,
        rejected=rejected,
        grid=grid_url(filters, page=min(before, max(0, found.counts.total - 1)) // filters.per_page + 1),
        look_address=lambda label: f"{url_for('photo.page')}?{_look(filters, this, label)}#explain",
        reviewer=request.cookies.get(REVIEWER_COOKIE, ""),
        goes_on=request.cookies.get(AUTO_ADVANCE_COOKIE, "1") == "1",
        key=_key(),
    )
    if rejected:
        answer.status_code = rejected.problem.status
        answer.headers.update({**rejected.problem.headers, "Cache-Control": "no-store"})
        record_problem(rejected.problem)
    return answer


def _explain(version: str, this: PredictionRecord, look: str) -> tuple[Explanation | None, Problem | None]:
    """Where the model looked, or why that cannot be said now; a class that there is none of is the caller's mistake."""
    try:
        return image_access().explain(version, this.photo, this.sha256, look), None
    except Problem as problem:
        if problem.code == "bad_parameter":
            raise
        return None, problem.without_traceback()


def _choices(
    classes: Sequence[str], this: PredictionRecord, probabilities: Sequence[tuple[str, float]]
) -> tuple[list[tuple[str, str]], list[str]]:
    """The classes that have a button, with the key of each; and those, where there are many, that are chosen from a list."""
    if len(classes) <= len(KEYS):
        return list(zip(classes, KEYS, strict=False)), []
    likely = [name for name, _ in probabilities[:MAX_CLASS_BUTTONS]]
    if this.label and this.label not in likely:
        likely.append(this.label)
    return list(zip(likely, KEYS, strict=False)), sorted(set(classes) - set(likely))


def _looks(this: PredictionRecord, probabilities: Sequence[tuple[str, float]]) -> tuple[list[str], list[str]]:
    """The classes to look for: first those that matter, then the most probable others."""
    foremost = list(dict.fromkeys(name for name in (this.predicted, this.label) if name))
    return foremost, [name for name, _ in probabilities if name not in foremost][:MAX_EXPLAIN_CLASSES]


def _neighbours(found: PredictionQuery, this: PredictionRecord) -> list[SimilarImage]:
    """The evaluated photos nearest to this one by the network's embedding."""
    for table in gallery().similarity_tables(found.model.version):
        if this.sha256 in table.sha256s:
            near = table.nearest(table.sha256s.index(this.sha256), MAX_NEIGHBORS)
            known = found.fetch_by_sha256([table.sha256s[row] for row, _ in near])
            return [
                SimilarImage(other.photo, other.sha256, other.label or "", other.split, similarity, other)
                for row, similarity in near
                if (other := known.get(table.sha256s[row]))
            ]
    return []


def _duplicates(found: PredictionQuery, this: PredictionRecord) -> list[SimilarImage]:
    """Photos of the dataset that are the same to the byte or to the eye, in whatever split."""
    groups: dict[str, DuplicateRow] = {}
    for table in gallery().similarity_tables(found.model.version):
        groups |= {
            other.photo: other for other in table.duplicates_of(this.sha256) if encode_file_name(other.photo) != this.photo
        }
    return [
        SimilarImage(name, other.sha256, other.label, other.split, None, _evaluated(found, name, other.sha256))
        for other in groups.values()
        if (name := encode_file_name(other.photo))
    ]


def _evaluated(found: PredictionQuery, name: str, sha256: str) -> PredictionRecord | None:
    """The photo of that very name, as a copy of it elsewhere has the same content."""
    with contextlib.suppress(Problem):
        return found.find(name, sha256)
    return None


def _warnings(this: PredictionRecord, duplicates: Sequence[SimilarImage]) -> list[str]:
    """What the near-duplicates say against the dataset."""
    found = []
    if labels := sorted({other.label for other in duplicates if this.label and other.label != this.label}):
        found.append(f"This photo is labelled {this.label}, and one that looks the same {' or '.join(labels)}: one is wrong.")
    if this.split and (splits := sorted({other.split for other in duplicates if other.split != this.split})):
        found.append(
            f"This photo lies in {this.split}, and one that looks the same in {' and '.join(splits)}: what is measured on "
            "photos that were trained with says too much good of the model."
        )
    return found


def _key() -> dict[str, Any]:
    """Whether decisions want a key here, and whose was given."""
    settings = services().settings
    try:
        return {"is_wanted": bool(settings.api_keys), "name": require_key_or_cookie(request, settings)}
    except Problem:
        return {"is_wanted": True, "name": None}


def _look(filters: Filter, this: PredictionRecord, label: str) -> str:
    return filters.query(photo=this.photo, sha256=this.sha256, explain=label)
