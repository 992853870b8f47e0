"""The gallery's part of the OpenAPI document: listings, pictures, decisions."""

from __future__ import annotations

from typing import Any

from service.api.openapi_operations import answer, get, parameter, said
from service.api.openapi_schemas import STRING, described, problem_answers, record
from service.db.filter import CHANGES, FACETS, FLAGS, OUTCOMES, PAGE_SIZES, REVIEWS, SORT_ORDERS, SOURCES

TAG = "Gallery"
FIXED = {"outcome": OUTCOMES, "source": SOURCES, "review": REVIEWS, "flag": FLAGS}
MEANING = {
    "outcome": "Whether the model is right; `unlabeled` where a live photo has no label.",
    "class": "The true class.",
    "predicted": "The predicted class.",
    "source": "Where the prediction is from.",
    "split": "The folder that the photo lay in.",
    "review": "What reviewers decided.",
    "flag": "`duplicate`: looks like a photo with another label. `mislabeled`: probably has a wrong one.",
}
ROW = {"type": "object", "description": "A photo: what it is, what the model said, what was decided."}
FAILING = ("internal_error", "not_ready", "database_unavailable")
DECODING = (
    "image_replaced", "not_an_image", "damaged_image", "too_many_pixels", "image_too_complex", "overloaded",
    "deadline_exceeded",
)  # fmt: skip


def gallery_paths(security: list[dict[str, list[str]]]) -> dict[str, Any]:
    """Path -> its operations; ``security`` is what writes want."""
    return {**_pages(), **_listings(), **_pictures(), **_compare(), **_decisions(security)}


def _filter(*, model_alone: bool = False) -> list[dict[str, Any]]:
    """The parameters of a grid, which all of its forms share."""
    model = parameter("model", STRING, "A model's version; the served one's where it is not given.")
    if model_alone:
        return [model]
    rows = [model]
    for name in FACETS:
        items = STRING | ({"enum": [*FIXED[name], ""]} if name in FIXED else {})
        words = f"{MEANING[name]} Given several times: any of them; empty: all."
        rows.append(parameter(name, {"type": "array", "items": items}, words))
    whole = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    return [
        *rows,
        parameter("confidence", STRING | {"pattern": "^([0-9]{1,2}-[0-9]{1,3})?$"}, "In whole per cent, as 50-90."),
        parameter("baseline", STRING, "Another model's version, with `change`."),
        parameter("change", STRING | {"enum": [*CHANGES, ""]}, "What differs from the model `baseline` on the same photo."),
        parameter(
            "sort", STRING | {"enum": [*SORT_ORDERS, ""]}, "What the order is by; highest loss first where it is not given."
        ),
        parameter("order", STRING | {"enum": ["asc", "desc", ""]}, "Each sort has a direction of its own."),
        parameter("seed", whole, "Which random order."),
        parameter("per_page", {"type": "integer", "minimum": PAGE_SIZES[0], "maximum": PAGE_SIZES[-1]}, "Photos on a page."),
    ]


def _page(operation: str, summary: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    page = answer("The page.", "text/html", STRING)
    codes = ("bad_parameter", "not_found", *FAILING)
    return {"get": said(get(operation, TAG, summary, page, *codes)) | {"parameters": parameters}}


def _pages() -> dict[str, Any]:
    whole = {"type": "integer", "minimum": 1, "maximum": 10**9}
    grid = [*_filter(), parameter("page", whole, "The page's number; behind the last one, the last is meant.")]
    photo = [
        parameter("photo", STRING, "Its name, as in predictions.csv."),
        parameter("sha256", STRING, "Its sha256, where two have the name."),
        parameter("explain", STRING, "A class: show where the model looked for it."),
        parameter("saved", STRING, "The id of the decision, note or undo that was just saved, to be said."),
        parameter("last", STRING, "The filter's last photo was just decided: say so."),
    ]
    found = {
        "/gallery": _page("gallery_home", "Queues of photos that are worth a look", _filter(model_alone=True)),
        "/gallery/photo": _page("gallery_photo", "One photo, and what comes next", [*_filter(), *photo]),
    }
    for name, words in (("photos", "All photos"), ("correct", "What is right"), ("incorrect", "What is wrong")):
        found[f"/gallery/{name}"] = _page(f"gallery_{name}", f"{words}, under a filter", grid)
        found[f"/gallery/{name}"]["get"]["responses"]["302"] = {"description": "To the last page, from behind it."}
    return found


def _listings() -> dict[str, Any]:
    rows = record("Every photo of the filter.", {"total": {"type": "integer"}, "rows": {"type": "array", "items": ROW}})
    codes = ("bad_parameter", "not_found", *FAILING)
    found: dict[str, Any] = {}
    for name in ("photos", "correct", "incorrect"):
        as_json = get(f"{name}_json", TAG, "The same as JSON", answer("All rows.", "application/json", rows), *codes)
        as_csv = get(f"{name}_csv", TAG, "The same as CSV", answer("All rows.", "text/csv", STRING), *codes)
        found[f"/gallery/{name}.json"] = {"get": as_json | {"parameters": _filter()}}
        found[f"/gallery/{name}.csv"] = {"get": as_csv | {"parameters": _filter()}}
    table = answer("A row for each photo that was decided about.", "text/csv", STRING)
    folder = answer("`production/train/CLASS/...`", "application/zip", {"type": "string", "format": "binary"})
    return found | {
        "/gallery/reviews.csv": {"get": get("reviews_csv", TAG, "What `finetune train --reviews` takes", table, *FAILING)},
        "/gallery/production.zip": {"get": get("production_zip", TAG, "Labelled live photos, to train with", folder, *FAILING)},
    }


def _pictures() -> dict[str, Any]:
    sha256 = parameter("sha256", STRING, "The photo's sha256.", place="path")
    photo = parameter("photo", STRING, "Its name, as in predictions.csv.")
    model = parameter("model", STRING, "A model's version.")
    label = parameter("class", STRING, "The class to look for.")
    codes = ("bad_parameter", "image_missing", "not_found", *DECODING, *FAILING)
    kinds = {
        "thumbnail.jpg": ("A small picture", "image/jpeg", [photo]),
        "original.jpg": ("The photo, upright and without metadata", "image/jpeg", [photo]),
        "crop.png": ("What the model saw", "image/png", [photo, model]),
        "heatmap.png": ("Where the model looked", "image/png", [photo, model, label]),
    }
    found = {}
    for name, (summary, media_type, parameters) in kinds.items():
        picture = answer("The picture.", media_type, {"type": "string", "format": "binary"})
        operation = get(name.partition(".")[0], TAG, summary, picture, *codes)
        operation["responses"]["304"] = {"description": "The browser has it."}
        found[f"/gallery/images/{{sha256}}/{name}"] = {"get": operation | {"parameters": [sha256, *parameters]}}
    colors = answer("The picture.", "image/png", {"type": "string", "format": "binary"})
    found["/gallery/images/legend.png"] = {"get": get("legend", TAG, "The colors of where it looked", colors)}
    return found


def _compare() -> dict[str, Any]:
    versions = [parameter(name, STRING, f"The version of the {age} model.") for name, age in (("a", "older"), ("b", "newer"))]
    numbers = answer("The numbers, and McNemar's exact test in words.", "application/json", {"type": "object"})
    as_json = get("compare_json", TAG, "The same as JSON", numbers, "bad_parameter", "not_found", *FAILING)
    return {
        "/compare": _page("compare", "Two models on the same photos", versions),
        "/compare.json": {"get": as_json | {"parameters": versions}},
    }


def _decisions(security: list[dict[str, list[str]]]) -> dict[str, Any]:
    words = "One of label, neither, bad, note, undo; `label:CLASS` says `new_label` as well, as one button of a form must."
    fields = {
        "photo": described(STRING, "Its name, as in predictions.csv."),
        "sha256": STRING,
        "model": described(STRING, "The version of the model that was looked at; the served one's if not given."),
        "decision": described({"type": "string", "pattern": "^(label(:.*)?|neither|bad|note|undo)$"}, words),
        "new_label": described(STRING, "With `label`: the true class."),
        "note": STRING | {"maxLength": 2000},
        "reviewer": STRING | {"maxLength": 80},
        "expected_version": described(STRING, "The id of the decision that was seen holding; empty where there was none."),
        "filter": described(STRING, "A grid's query string."),
        "advance": described(STRING, "1: go on to the photo that follows in `filter`."),
    }
    optional = tuple(name for name in fields if name not in ("photo", "sha256", "decision"))
    form = record("A decision about a photo.", fields, optional=optional)
    saved = answer("It is saved; the photo's history, the newest first.", "application/json", {"type": "object"})
    wrong = (
        "unauthorized",
        "cross_site_request",
        "bad_parameter",
        "bad_json",
        "json_too_large",
        "bad_request",
        "not_found",
        "body_too_large",
    )
    review = {
        "operationId": "review",
        "tags": [TAG],
        "summary": "Decide about a photo",
        "description": "It is on disk before it is answered. A form is answered with the way to the next page.",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": form}, "application/x-www-form-urlencoded": {"schema": form}},
        },
        "responses": {
            "200": saved,
            "303": {"description": "To the next page."},
            **problem_answers(*wrong, "review_conflict", "nothing_to_undo", *FAILING),
        },
        "security": security,
    }
    key_fields = {"key": STRING, "back": described(STRING, "The page to go back to.")}
    key_form = {"application/x-www-form-urlencoded": {"schema": record("A key.", key_fields, optional=("back",))}}
    key = {
        "operationId": "gallery_key",
        "tags": [TAG],
        "summary": "Take a key into a cookie",
        "requestBody": {"required": True, "content": key_form},
        "responses": {
            "303": {"description": "Back to the page."},
            **problem_answers("unauthorized", "cross_site_request", "bad_parameter", "body_too_large"),
        },
    }
    entries = answer("The newest first.", "application/json", {"type": "object"})
    past = get("history", TAG, "What was decided about a photo", entries, "bad_parameter", *FAILING)
    sha256 = parameter("sha256", STRING, "The photo's sha256.")
    return {
        "/gallery/review": {"post": _said_too(review)},
        "/gallery/key": {"post": _said_too(key)},
        "/gallery/history.json": {"get": past | {"parameters": [sha256]}},
    }


def _said_too(operation: dict[str, Any]) -> dict[str, Any]:
    """The same operation where a form's problems are said on a page, and a program's come as JSON."""
    for status, given in operation["responses"].items():
        if int(status) >= 400:
            given["content"] = {**given["content"], "text/html": {"schema": STRING}}
    return operation
