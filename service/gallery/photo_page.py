"""A photo's page: what it is, what the model said and why, what it looks like, what was decided, and what comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, Response, current_app, request

from models.lookalikes import Duplicate
from service.filters import sentence
from service.gallery.album import album
from service.gallery.asking import asked_filter, listing
from service.gallery.core import gallery
from service.gallery.pages import address_of, photo_address, render
from service.gallery.review import NAME
from service.problems import Problem
from service.security import require_key_or_cookie
from service.settings import Settings
from service.site import problem_page
from service.store.importing import storable
from service.store.listing import Listing, Photo
from service.store.reviewing import history

NEIGHBOURS = 8

bp = Blueprint("photo", __name__)


@dataclass(frozen=True)
class Alike:
    """A photo that looks like another: by its ``similarity`` (cosine of the embeddings), or the same to byte or eye (None)."""

    name: str
    sha256: str
    label: str
    split: str
    similarity: float | None
    photo: Photo | None  # where the model was evaluated on it


@bp.errorhandler(Problem)
def say(problem: Problem) -> Response:
    return problem_page(problem)


@bp.get("/gallery/photo")
def page() -> Response:
    """One photo under the filter that one came with, which says what comes before and after it."""
    wanted = asked_filter(also=("photo", "sha256", "look"))
    shown = gallery()
    with listing(wanted) as found:
        this = found.find(request.args.get("photo", ""), request.args.get("sha256", ""))
        before, previous, following = found.around(this)
        neighbours = _neighbours(found, this)
        duplicates = _duplicates(found, this)
        with shown.database.read() as connection:
            past = history(connection, this.sha256)
    model = found.model
    trouble = album().look_for(this.photo, this.sha256)
    has_bundle = shown.bundle_path(model.version) is not None
    look = request.args.get("look", "")
    explanation = None
    if look and has_bundle and not trouble:
        explanation = album().explain(model.version, this.photo, this.sha256, look)
    return render(
        "gallery/photo.html",
        wanted=wanted,
        model=model,
        photo=this,
        probabilities=sorted(zip(model.classes, map(float, this.probabilities), strict=True), key=lambda row: -row[1]),
        trouble=trouble,
        has_bundle=has_bundle,
        look=look,
        explanation=explanation,
        neighbours=neighbours,
        duplicates=duplicates,
        history=past,
        said=sentence(wanted, found.counts.total, name=model.name),
        total=found.counts.total,
        before=before,
        previous=previous,
        following=following,
        grid=address_of(wanted, page=before // wanted.per_page + 1),
        look_address=lambda label: f"{photo_address(wanted, this)}&{_look(label)}#look",
        reviewer=request.cookies.get(NAME, ""),
        key=_key(),
    )


def _neighbours(found: Listing, this: Photo) -> list[Alike]:
    """The evaluated photos nearest to this one by the network's embedding."""
    for table in gallery().lookalikes(found.model.version):
        if this.sha256 in table.sha256s:
            near = table.nearest(table.sha256s.index(this.sha256), NEIGHBOURS)
            known = found.with_sha256([table.sha256s[row] for row, _ in near])
            return [
                Alike(other.photo, other.sha256, other.label or "", other.split, similarity, other)
                for row, similarity in near
                if (other := known.get(table.sha256s[row]))
            ]
    return []


def _duplicates(found: Listing, this: Photo) -> list[Alike]:
    """Photos of the dataset that are the same to the byte or to the eye, in whatever split."""
    groups: dict[str, Duplicate] = {}
    for table in gallery().lookalikes(found.model.version):
        groups |= {other.photo: other for other in table.group_of(this.sha256) if storable(other.photo) != this.photo}
    known = found.with_sha256([other.sha256 for other in groups.values()])
    return [
        Alike(storable(other.photo), other.sha256, other.label, other.split, None, known.get(other.sha256))
        for other in groups.values()
    ]


def _key() -> dict[str, Any]:
    """Whether decisions want a key here, and whose was given."""
    settings: Settings = current_app.extensions["settings"]
    try:
        return {"is_wanted": bool(settings.api_keys), "name": require_key_or_cookie(request, settings)}
    except Problem:
        return {"is_wanted": True, "name": None}


def _look(label: str) -> str:
    return urlencode({"look": label})
