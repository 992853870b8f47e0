"""The listings' twins for programs: every row of a filter as JSON or CSV, and what was decided as reviews.csv."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from flask import Blueprint, Response, request, stream_with_context, url_for

from models.artifacts.reviews import Review, write_reviews
from service.context import gallery
from service.db import production
from service.db.connection import Database
from service.db.filter import Filter
from service.db.ingest import decode_file_name
from service.db.query import ModelRecord, PredictionRecord
from service.gallery import sidebar
from service.gallery.sidebar import open_query, page_filter_from_request
from service.reviews.decisions import list_reviews

CHUNK = 500
MIB = 1 << 20
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")
Rows = Iterator[PredictionRecord]

bp = Blueprint("exports", __name__)


@bp.get("/gallery/photos.json", endpoint="photos_json")
@bp.get("/gallery/correct.json", endpoint="correct_json", defaults={"outcome": "correct"})
@bp.get("/gallery/incorrect.json", endpoint="incorrect_json", defaults={"outcome": "incorrect"})
def as_json(outcome: str = "") -> Response:
    """{"total": N, "rows": [...]} over the whole filter."""
    filters = _asked(outcome)
    total, model, rows = _everything(filters)

    def text() -> Iterator[str]:
        yield f'{{"total": {total}, "rows": ['
        for number, photo in enumerate(rows):
            yield (",\n" if number else "\n") + json.dumps(row_to_json(photo, model))
        yield "]}\n"

    return Response(stream_with_context(text()), headers={"Cache-Control": "no-cache"}, mimetype="application/json")


@bp.get("/gallery/photos.csv", endpoint="photos_csv")
@bp.get("/gallery/correct.csv", endpoint="correct_csv", defaults={"outcome": "correct"})
@bp.get("/gallery/incorrect.csv", endpoint="incorrect_csv", defaults={"outcome": "incorrect"})
def as_csv(outcome: str = "") -> Response:
    """The columns of predictions.csv, then what the gallery knows beside."""
    filters = _asked(outcome)
    _, model, rows = _everything(filters)
    header = ["photo", "label", "predicted", *(f"p_{name}" for name in model.classes), "loss", "split", "sha256"]
    header += ["source", "outcome", "confidence", "margin", "review", "flags", "new_label", "note", "reviewer"]
    lines = (_csv_row(photo) for photo in rows)
    return _csv(header, lines, f"{outcome or 'photos'}.csv")


@bp.get("/gallery/reviews.csv")
def reviews_csv() -> Response:
    """What holds of every photo that was decided about: what `finetune train --reviews` takes."""
    with gallery().database.read() as connection:
        found = [_review(row) for row in list_reviews(connection)]
    headers = {"Cache-Control": "no-cache", "Content-Disposition": 'attachment; filename="reviews.csv"'}
    return Response(write_reviews(found), headers=headers, content_type="text/csv; charset=utf-8")


@bp.get("/gallery/production.zip")
def production_zip() -> Response:
    """The live photos that were given a class, as a folder that `finetune train --extra-data` takes."""
    database = gallery().database
    with database.read() as connection:
        chosen = list(production.labeled_images(connection))
    headers = {"Cache-Control": "no-cache", "Content-Disposition": 'attachment; filename="production.zip"'}
    return Response(_zipped(database, chosen), headers=headers, mimetype="application/zip")


def _zipped(database: Database, chosen: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """The photos of these sha256s and classes as a ZIP file, one after the other, so that one is in memory at a time."""
    outgoing = _Outgoing()
    with zipfile.ZipFile(outgoing, "w") as folder:  # stored: photos are compressed already
        for sha256, label in chosen:
            with database.read() as connection:
                data = production.load_image(connection, sha256)
            if data is not None:
                folder.writestr(f"production/train/{label}/{sha256[:16]}{production.file_suffix(data)}", data)
                yield outgoing.taken()
    yield outgoing.taken()


class _Outgoing(io.RawIOBase):
    """A file that is written and taken away, never read or sought."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._bytes += data
        return len(data)

    def taken(self) -> bytes:
        """What was written since the last time."""
        taken, self._bytes = bytes(self._bytes), bytearray()
        return taken


def row_to_json(photo: PredictionRecord, model: ModelRecord) -> dict[str, Any]:
    """A photo as JSON has it."""
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
        "flags": list_flags(photo),
        "review": photo.review,
        "decision": decision
        and {
            "id": decision.id,
            "decision": decision.decision,
            "new_label": decision.new_label,
            "note": decision.note,
            "reviewer": decision.reviewer,
            "decided_at": decision.decided_at.isoformat(timespec="seconds"),
        },
        "page": url_for("photo.page", photo=photo.photo, sha256=photo.sha256, model=model.version),
        "thumbnail": url_for("images.thumbnail", sha256=photo.sha256, photo=photo.photo),
    }


def list_flags(photo: PredictionRecord) -> list[str]:
    return ["duplicate"] * photo.duplicate + ["mislabeled"] * photo.mislabeled


def _review(row: Any) -> Review:
    return Review(
        sha256=row.sha256,
        photo=decode_file_name(row.photo),
        label=row.label or "",
        decision=row.decision,
        new_label=row.new_label or "",
        note=_no_formula(row.note),
        reviewer=_no_formula(row.reviewer),
        decided_at=row.decided_at.isoformat(timespec="seconds"),
    )


def _asked(outcome: str) -> Filter:
    """The filter of the page's own address; which page of it that is makes no difference here."""
    return sidebar.apply_range_params(page_filter_from_request(**({"outcomes": (outcome,)} if outcome else {})), request.args)


def _everything(filters: Filter) -> tuple[int, ModelRecord, Rows]:
    """Count, model and rows; no transaction is open while a slow client reads."""
    with open_query(filters) as found:
        ids, model = found.ids(), found.model
    database = gallery().database

    def rows() -> Rows:
        for start in range(0, len(ids), CHUNK):
            with database.read() as connection:
                chunk = found.with_connection(connection).fetch(ids[start : start + CHUNK])
            yield from chunk

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
        photo.review,
        " ".join(list_flags(photo)),
        (decision and decision.new_label) or "",
        _no_formula(decision.note) if decision else "",
        _no_formula(decision.reviewer) if decision else "",
    ]


def _csv(header: Sequence[str], rows: Iterator[Sequence[Any]], name: str) -> Response:
    def text() -> Iterator[bytes]:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            if buffer.tell() > MIB // 16:
                yield _taken(buffer)
        yield _taken(buffer)

    headers = {"Cache-Control": "no-cache", "Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text(), headers=headers, content_type="text/csv; charset=utf-8")


def _taken(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue().encode("utf-8", "surrogateescape")
    buffer.seek(0)
    buffer.truncate()
    return text


def _no_formula(text: str) -> str:
    """People type these; a spreadsheet would compute what begins like a formula."""
    return f"'{text}" if text.startswith(FORMULA_PREFIXES) else text
