"""The start page of the studio, and what its pages share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from flask import Blueprint, Response, render_template

from models.preprocess import IMAGE_FORMATS_TEXT
from service.context import services, workspace
from service.studio.authorization import protect
from service.studio.data_sets import UNLABELED, DataSet
from service.studio.finetune_process import is_installed
from service.web.upload_page import ACCEPTED_TYPES

PREVIEWS = 4

bp = protect(Blueprint("studio", __name__, url_prefix="/studio"))


@bp.get("")
def start() -> Response:
    """Show how to begin, and the datasets."""
    names = workspace().dataset_names()
    rows = []
    for name in names:
        data_set = DataSet(workspace(), services().settings, name)
        classes = {class_: [photo for own in by.values() for photo in own] for class_, by in data_set.classes().items()}
        photos = [*classes.values(), data_set.photos_of(UNLABELED)]
        rows.append(
            {
                "data_set": data_set,
                "classes": list(classes),
                "photos": sum(map(len, photos)),
                # in turns, so that each class is seen
                "previews": [photo for turn in itertools.zip_longest(*photos) for photo in turn if photo][:PREVIEWS],
            }
        )
    return page(
        "studio/start.html",
        rows=rows,
        suggestion=free_name("my photos", names),
        demo_suggestion=free_name("drawn pictures", names),
        server_suggestion=free_name("server photos", names),
        is_installed=is_installed(),
    )


def free_name(name: str, taken: Iterable[str]) -> str:
    """Return a name for a new dataset, with a number if it is taken."""
    used = {other.casefold() for other in taken}
    names = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
    return next(free for free in names if free.casefold() not in used)


def page(template: str, *, refresh_s: int | None = None, **context: object) -> Response:
    """Render a page of the studio. A browser must not reuse it, as data changes at any time.

    Args:
        template: The page.
        refresh_s: After how many seconds it reloads itself, while something is running.
        **context: Further variables of the template.
    """
    settings = services().settings
    shared = {
        "settings": settings,
        "needs_key": bool(settings.api_keys or settings.admin_keys),
        "accept": ACCEPTED_TYPES,
        "formats": IMAGE_FORMATS_TEXT,
        "refresh_s": refresh_s,
    }
    text = render_template(template, **shared, **context)
    return Response(text, headers={"Cache-Control": "no-store"}, mimetype="text/html")
