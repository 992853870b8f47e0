"""The gallery's listing pages: the queues to begin with, and one grid behind them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, redirect, render_template, request, url_for

from service.filters import FACETS, ORDERS, PER_PAGE, UNLABELLED, Filter, read_page, sentence
from service.gallery.asking import asked_filter, listing
from service.gallery.core import gallery
from service.gallery.queues import Queue, queues
from service.problems import Problem
from service.site import problem_page
from service.store.counts import BINS, Counts
from service.store.listing import Listing, Photo, find_model, known_models

THUMBNAILS = 8  # a queue's row
FACET_TITLES = {
    "verdict": "Right or wrong",
    "class": "True class",
    "predicted": "Predicted class",
    "source": "Where from",
    "split": "Split",
    "review": "Review",
    "flag": "Looks like",
}

bp = Blueprint("gallery", __name__)


@dataclass(frozen=True)
class Shown:
    """A queue with its number of photos and the first of them."""

    queue: Queue
    total: int
    photos: list[Photo]


@dataclass(frozen=True)
class Choice:
    """A value of a facet, how many photos it would show, and the address that adds it or takes it away."""

    value: str
    photos: int
    is_chosen: bool
    address: str


@bp.get("/gallery")
def home() -> Response:
    version = request.args.get("model") or ""
    shown = gallery()
    database = shown.database
    version = version or shown.version or ""
    with database.read() as connection:
        model = find_model(connection, version)
        rows = []
        for queue in queues(version, model.classes):
            found = Listing(connection, queue.wanted)
            rows.append(Shown(queue, found.counts.total, found.first(THUMBNAILS)))
        everything = Listing(connection, Filter(model=version)).counts
        models = known_models(connection)
    return render("gallery/home.html", model=model, rows=rows, counts=everything, models=models, served=shown.version)


@bp.get("/gallery/photos")
def photos() -> Response:
    return _grid("photos")


@bp.get("/gallery/correct")
def correct() -> Response:
    return _grid("correct", verdicts=("right",))


@bp.get("/gallery/incorrect")
def incorrect() -> Response:
    return _grid("incorrect", verdicts=("wrong",))


@bp.errorhandler(Problem)
def say(problem: Problem) -> Response:
    return problem_page(problem)


def _grid(name: str, **preset: tuple[str, ...]) -> Response:
    """The grid under a filter. ``/gallery/correct`` and ``/gallery/incorrect`` are filters with a name."""
    wanted = asked_filter(also=("page",), **preset)
    number = read_page(request.args)
    with listing(wanted) as found:
        if number > found.pages:
            return redirect(address_of(wanted, page=found.pages))  # type: ignore[return-value]
        page = found.page(number)
    return render(
        "gallery/photos.html",
        wanted=wanted,
        model=found.model,
        said=sentence(wanted, found.counts.total, name=found.model.name),
        total=found.counts.total,
        photos=page,
        first=(number - 1) * wanted.per_page + 1,
        page=number,
        pages=found.pages,
        page_address=lambda page: address_of(wanted, page=page),
        facets=_facets(wanted, found.counts),
        confusion=_confusion(wanted, found),
        histogram=_histogram(wanted, found.counts),
        sorts=[
            (sort, order, words, address_of(wanted.having(sort=sort, order=order)))
            for sort, (_, named) in ORDERS.items()
            for order, words in named.items()
        ],
        sizes=[(size, address_of(wanted.having(per_page=size))) for size in PER_PAGE],
        everything=address_of(wanted.cleared()),
        twins={kind: f"{url_for(f'exports.photos_{kind}')}?{wanted.query()}" for kind in ("json", "csv")},
        another=address_of(wanted.having(sort="random", seed=wanted.seed + 1)),
    )


def address_of(wanted: Filter, **more: Any) -> str:
    """The grid's address with this filter; page 1 is not said."""
    if more.get("page") == 1:
        del more["page"]
    return f"{url_for('gallery.photos')}?{wanted.query(**more)}"


def photo_address(wanted: Filter, photo: Photo) -> str:
    """The address of a photo's page, which knows the filter that one came from."""
    return f"{url_for('photo.page')}?{wanted.query(photo=photo.photo, sha256=photo.sha256)}"


def _facets(wanted: Filter, counts: Counts) -> list[tuple[str, str, list[Choice]]]:
    """Parameter, title and values of each facet that has anything to choose."""
    rows = []
    for parameter, field in FACETS.items():
        chosen: tuple[str, ...] = getattr(wanted, field)
        values = sorted({*counts.facets[parameter], *chosen}, key=lambda value: (-counts.facets[parameter][value], value))
        choices = [
            Choice(value, counts.facets[parameter][value], value in chosen, address_of(wanted.toggled(parameter, value)))
            for value in values
            if value
        ]
        if len(choices) > 1 or chosen or parameter == "flag":
            rows.append((parameter, FACET_TITLES[parameter], choices))
    return rows


def _confusion(wanted: Filter, found: Listing) -> list[tuple[str, list[tuple[str, int, str]]]]:
    """A row for each true class: its name, and for each predicted class the name, the number and the address of those."""
    counts = found.counts.confusion
    classes = found.model.classes
    labels = [name for name in (*classes, UNLABELLED) if any(counts[name, other] for other in classes)]
    return [
        (
            label,
            [
                (other, counts[label, other], address_of(wanted.having(labels=(label,), predicted=(other,))))
                for other in classes
            ],
        )
        for label in labels
    ]


def _histogram(wanted: Filter, counts: Counts) -> list[tuple[int, int, int, float, str]]:
    """For each bar: from and to in per cent, the photos, the height from 0 to 1, the address of those."""
    highest = max(counts.histogram) or 1
    step = 100 // BINS
    return [
        (i * step, (i + 1) * step, photos, photos / highest, address_of(wanted.having(confidence=(i * step, (i + 1) * step))))
        for i, photos in enumerate(counts.histogram)
    ]


def render(template: str, **context: Any) -> Response:
    text = render_template(template, photo_address=photo_address, **context)
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")
