"""Export for programs: the photos of a filter as JSON or CSV, reviews.csv and production.zip."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from flask import Blueprint, Response, request, stream_with_context, url_for

from models.artifacts.predictions import FACET_PREFIX, GROUP_COLUMN, ODD_FILE_COLUMN
from models.artifacts.reviews import write_reviews
from models.artifacts.text_table import csv_writer
from service.context import gallery
from service.db import production
from service.db.connection import Database
from service.db.facets import ODD_FILE, list_columns, load_columns
from service.db.filter import FLAGS, Filter
from service.db.query import ViewVersion
from service.db.records import ModelRecord, PredictionRecord
from service.db.text import decode_file_name
from service.gallery import sidebar
from service.gallery.sidebar import open_query, page_filter_from_request
from service.reviews.decisions import list_reviews

CHUNK = 500
MIB = 1 << 20
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")
Columns = dict[str, str]  # the values of a photo in the further columns of a table of labels
Rows = Iterator[tuple[PredictionRecord, Columns]]

bp = Blueprint("exports", __name__)


@bp.get("/gallery/photos.json", endpoint="photos_json")
@bp.get("/gallery/correct.json", endpoint="correct_json", defaults={"outcome": "correct"})
@bp.get("/gallery/incorrect.json", endpoint="incorrect_json", defaults={"outcome": "incorrect"})
def as_json(outcome: str = "") -> Response:
    """Stream {"total": N, "view": VERSION, "rows": [...]} with all photos of the filter."""
    filters = _filter(outcome)
    with gallery().database.read() as connection:  # first: what is stored later has not been seen
        view = ViewVersion.load(connection)
    total, model, rows = _query_all(filters)

    def stream() -> Iterator[str]:
        yield f'{{"total": {total}, "view": "{view}", "rows": ['
        for number, (photo, columns) in enumerate(rows):
            yield (",\n" if number else "\n") + json.dumps(row_to_json(photo, model, columns))
        yield "]}\n"

    return Response(stream_with_context(stream()), headers={"Cache-Control": "no-cache"}, mimetype="application/json")


@bp.get("/gallery/photos.csv", endpoint="photos_csv")
@bp.get("/gallery/correct.csv", endpoint="correct_csv", defaults={"outcome": "correct"})
@bp.get("/gallery/incorrect.csv", endpoint="incorrect_csv", defaults={"outcome": "incorrect"})
def as_csv(outcome: str = "") -> Response:
    """Stream the columns of predictions.csv, followed by those of the gallery and of a table of labels."""
    filters = _filter(outcome)
    _, model, rows = _query_all(filters)
    with gallery().database.read() as connection:
        names = list_columns(connection, model.id)
    header = ["photo", "label", "predicted", *(f"p_{name}" for name in model.classes), "loss", "split", "sha256"]
    header += ["source", "outcome", "confidence", "margin", "ood_score", "review", "flags", "new_label", "note", "reviewer"]
    own = {GROUP_COLUMN: GROUP_COLUMN, ODD_FILE: ODD_FILE_COLUMN}
    header += [own.get(name, f"{FACET_PREFIX}{name}") for name in names]
    lines = (
        [*_csv_row(photo), *(_escape_formula(decode_file_name(columns.get(name, ""))) for name in names)]
        for photo, columns in rows
    )
    return _csv(header, lines, f"{outcome or 'photos'}.csv")


@bp.get("/gallery/reviews.csv")
def reviews_csv() -> Response:
    """Return the current reviews and all notes, for `finetune train --reviews`."""
    with gallery().database.read() as connection:
        reviews = list_reviews(connection)
    rows = (
        replace(
            review,
            photo=decode_file_name(review.photo),
            note=_escape_formula(review.note),
            reviewer=_escape_formula(review.reviewer),
        )
        for review in reviews
    )
    headers = {"Cache-Control": "no-cache", "Content-Disposition": 'attachment; filename="reviews.csv"'}
    return Response(write_reviews(rows), headers=headers, content_type="text/csv; charset=utf-8")


@bp.get("/gallery/production.zip")
def production_zip() -> Response:
    """Return the labeled production photos as a folder for `finetune train --extra-data`.

    Photos of none of the classes are in the folder ``neither``, which training ignores and `finetune evaluate` measures.
    """
    database = gallery().database
    with database.read() as connection:
        labeled = list(production.labeled_images(connection))
    headers = {"Cache-Control": "no-cache", "Content-Disposition": 'attachment; filename="production.zip"'}
    return Response(_zip(database, labeled), headers=headers, mimetype="application/zip")


def _zip(database: Database, labeled: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """Stream a ZIP file of images, given by sha256 and class, with one image in memory at a time."""
    buffer = _ZipBuffer()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, as images are compressed already
        for sha256, label in labeled:
            with database.read() as connection:
                data = production.load_image(connection, sha256)
            if data is not None:
                archive.writestr(f"production/train/{label}/{sha256[:16]}{production.file_suffix(data)}", data)
                yield buffer.take()
    yield buffer.take()


class _ZipBuffer(io.RawIOBase):
    """A write-only file whose content is taken away piece by piece."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data, self._bytes = bytes(self._bytes), bytearray()
        return data


def row_to_json(photo: PredictionRecord, model: ModelRecord, columns: Columns) -> dict[str, Any]:
    """Convert a photo to JSON."""
    decision = photo.decision
    return {
        "photo": photo.photo,
        "sha256": photo.sha256,
        "source": photo.source,
        "split": photo.split,
        "label": photo.label,
        "predicted": photo.predicted,
        "outcome": photo.outcome,
        "confidence": photo.confidence,
        "margin": photo.margin,
        "loss": photo.loss,
        "probabilities": dict(zip(model.classes, (round(float(p), 9) for p in photo.probabilities), strict=True)),
        "columns": columns,
        "ood_score": photo.ood_score,
        "flags": list_flags(photo),
        "review": photo.review,
        "received_at": photo.received_at and photo.received_at.isoformat(timespec="seconds"),
        "decision": decision and asdict(decision) | {"decided_at": decision.decided_at.isoformat(timespec="seconds")},
        "page": url_for("photo.page", photo=photo.photo, sha256=photo.sha256, model=model.version),
        "thumbnail": url_for("images.thumbnail", sha256=photo.sha256, photo=photo.photo),
    }


def list_flags(photo: PredictionRecord) -> list[str]:
    """List the flags of a photo."""
    return [name for name in FLAGS if getattr(photo, name)]


def _filter(outcome: str) -> Filter:
    """Parse the filter of the request. The page number is ignored."""
    return sidebar.apply_range_params(page_filter_from_request(**({"outcomes": (outcome,)} if outcome else {})), request.args)


def _query_all(filters: Filter) -> tuple[int, ModelRecord, Rows]:
    """Return the number of photos, the model and the rows. No transaction is open while a slow client reads."""
    with open_query(filters) as query:
        ids, model = query.ids(), query.model
    database = gallery().database

    def rows() -> Rows:
        for start in range(0, len(ids), CHUNK):
            with database.read() as connection:
                chunk = query.with_connection(connection).fetch(ids[start : start + CHUNK])
                columns = load_columns(connection, ids[start : start + CHUNK])
            yield from ((photo, columns.get(photo.id, {})) for photo in chunk)

    return len(ids), model, rows()


def _csv_row(photo: PredictionRecord) -> list[Any]:
    probabilities = [f"{p:.9g}" for p in photo.probabilities]
    loss = "" if photo.loss is None else f"{photo.loss:.9g}"
    decision = photo.decision
    return [
        decode_file_name(photo.photo),
        photo.label or "",
        photo.predicted,
        *probabilities,
        loss,
        photo.split,
        photo.sha256,
        photo.source,
        photo.outcome,
        f"{photo.confidence:.9g}",
        f"{photo.margin:.9g}",
        "" if photo.ood_score is None else f"{photo.ood_score:.9g}",
        photo.review,
        " ".join(list_flags(photo)),
        (decision and decision.new_label) or "",
        _escape_formula(decision.note) if decision else "",
        _escape_formula(decision.reviewer) if decision else "",
    ]


def _csv(header: Sequence[str], rows: Iterator[Sequence[Any]], name: str) -> Response:
    def stream() -> Iterator[bytes]:
        buffer = io.StringIO(newline="")
        writer = csv_writer(buffer)
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            if buffer.tell() > MIB // 16:
                yield _take(buffer)
        yield _take(buffer)

    headers = {"Cache-Control": "no-cache", "Content-Disposition": f'attachment; filename="{name}"'}
    return Response(stream(), headers=headers, content_type="text/csv; charset=utf-8")


def _take(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue().encode("utf-8", "surrogateescape")
    buffer.seek(0)
    buffer.truncate()
    return text


def _escape_formula(text: str) -> str:
    """Escape text that people typed and that a spreadsheet would evaluate as a formula."""
    return f"'{text}" if text.startswith(FORMULA_PREFIXES) else text
