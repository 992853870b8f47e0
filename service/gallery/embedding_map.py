"""GET /gallery/map: all evaluated photos as points, so that similar photos are near each other. A lasso leads to the grid."""

from __future__ import annotations

import json
from typing import Any

from flask import Blueprint, Response, jsonify, request, url_for
from sqlalchemy import select

from models.artifacts.similarity import MAP_SIZE
from service.context import gallery
from service.db.errors import RecordNotFoundError
from service.db.filter import Filter
from service.db.query import PredictionQuery, get_model, list_models
from service.db.records import ModelRecord
from service.db.schema import buckets, predictions
from service.gallery.grid import render_gallery
from service.gallery.index import EmbeddingMap
from service.gallery.sidebar import grid_url, photo_url
from service.http.errors import Problem
from service.web.layout import problem_page

bp = Blueprint("embedding_map", __name__)
bp.register_error_handler(Problem, problem_page)
json_bp = Blueprint("embedding_map_json", __name__)


@bp.get("/gallery/map")
def page() -> Response:
    """Show the map of an evaluation. The points are loaded by a script."""
    version = _version("model", "map")
    with gallery().database.read() as connection:
        model = get_model(connection, version)
        models = list_models(connection)
    maps = gallery().maps(version)
    shown = _find(maps, request.args.get("map", ""))
    return render_gallery(
        "gallery/map.html",
        model_shown=model,
        models=models,
        served=gallery().active_version,
        maps=maps,
        shown=shown,
        grid=grid_url(Filter(model=version)),
        map_size=MAP_SIZE,
    )


@json_bp.get("/gallery/map.json")
def as_json() -> Response:
    """Return the points of a map by columns: coordinates from 0 to ``size``, and what they can be colored by."""
    version = _version("model", "map")
    found = _find(gallery().maps(version), request.args.get("map", ""))
    if found is None:
        raise RecordNotFoundError(f"No evaluation of the model {version} on this machine has embeddings. Evaluate it again.")
    with gallery().database.read() as connection:
        model = get_model(connection, version)
        columns = (
            predictions.c.id,
            predictions.c.sha256,
            predictions.c.confidence,
            buckets.c.label,
            buckets.c.predicted,
            buckets.c.split,
            buckets.c.review,
        )
        rows = connection.execute(select(*columns).join(buckets).where(predictions.c.model_id == model.id)).all()
    row_of, points = found.table.row_by_sha256, found.table.points.tolist()
    rows = [row for row in rows if row.sha256 in row_of]
    splits = sorted({row.split for row in rows})
    number = {split: index for index, split in enumerate(splits)}
    document = {
        "map": found.name,
        "size": MAP_SIZE,
        "classes": model.classes,
        "splits": splits,
        "id": [row.id for row in rows],
        "x": [points[row_of[row.sha256]][0] for row in rows],
        "y": [points[row_of[row.sha256]][1] for row in rows],
        "label": [row.label for row in rows],
        "predicted": [row.predicted for row in rows],
        "split": [number[row.split] for row in rows],
        "percent": [round(100 * row.confidence) for row in rows],
        "reviewed": [int(row.review != "unreviewed") for row in rows],
    }
    body = json.dumps(document, separators=(",", ":"))
    return Response(body, headers={"Cache-Control": "no-cache"}, mimetype="application/json")


@json_bp.get("/gallery/map/photo.json")
def photo_json() -> Response:
    """Describe one point: the photo's name, classes, page and thumbnail."""
    version = _version("model", "id")
    text = request.args.get("id", "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Problem("bad_parameter", f"`id` must be the id of a point (got {text[:40]!r}).")
    filters = Filter(model=version)
    with gallery().database.read() as connection:
        model: ModelRecord = get_model(connection, version)
        query = PredictionQuery(connection, filters)
        found = next((photo for photo in query.fetch([int(text)]) if query.matches(photo)), None)
    if found is None:
        raise RecordNotFoundError(f"The model {model.version} has no prediction with the id {text}.")
    answer: dict[str, Any] = {
        "photo": found.photo,
        "label": found.label,
        "predicted": found.predicted,
        "confidence": found.confidence,
        "page": photo_url(filters, found),
        "thumbnail": url_for("images.thumbnail", sha256=found.sha256, photo=found.photo),
    }
    response = jsonify(answer)
    response.headers["Cache-Control"] = "no-cache"
    return response


def _version(*known: str) -> str:
    """Return the version of the model. Raises Problem for an unknown parameter."""
    for name in request.args:
        if name not in known:
            raise Problem("bad_parameter", f'Unknown parameter "{name}". Valid parameters: {", ".join(known)}.')
    return request.args.get("model") or gallery().active_version or ""


def _find(maps: list[EmbeddingMap], name: str) -> EmbeddingMap | None:
    """Return the map of this name, or the one with the most photos. Raises RecordNotFoundError."""
    if not name:
        return max(maps, key=lambda one: len(one.table.sha256s), default=None)
    found = next((one for one in maps if one.name == name), None)
    if found is None:
        raise RecordNotFoundError(f"There is no map {name[:80]!r}. /gallery/map shows the maps of the active model.")
    return found
