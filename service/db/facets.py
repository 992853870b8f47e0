"""The further columns of a table of labels, such as the camera of each photo: import, filter and count them.

A column with few values, or of numbers in ranges, is a facet: a photo refers to its value. All values of a photo, also those of
columns that are no facets, are stored with it to be shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, func, insert, select

from models.artifacts.facets import Facet, make_facets
from models.artifacts.predictions import GROUP_COLUMN, Predictions
from service.db.schema import facet_columns, facet_values, photo_columns, photo_facets, predictions
from service.db.text import encode_file_name

CHUNK_ROWS = 5_000
ODD_FILE = "odd file"  # a column of what evaluations measure; a photo has several of its values, or none


@dataclass(frozen=True)
class FacetValue:
    """A value of a column. ``key`` is its form in a query string."""

    id: int
    column: str
    value: str

    @property
    def key(self) -> str:
        return f"{self.column}:{self.value}"


def import_columns(
    connection: Connection,
    model_id: int,
    table: Predictions,
    photos: Mapping[tuple[str, str], tuple[int, int]],
    rows: Sequence[int],
) -> None:
    """Store the columns of imported photos.

    Args:
        connection: A transaction.
        model_id: The model.
        table: The imported predictions.
        photos: The id and the bucket of each photo of the model by its name and sha256.
        rows: The rows of ``table`` that were inserted.
    """
    columns = {name: list(map(encode_file_name, values)) for name, values in _columns(table).items()}
    facets = make_facets(columns)
    if table.odd_files:
        columns[ODD_FILE] = list(table.odd_files)
        kinds = list(dict.fromkeys(kind for text in table.odd_files for kind in _kinds(text)))
        facets.append(Facet(ODD_FILE, table.odd_files, tuple(kinds)))
    if not columns or not rows:
        return
    names = list(map(encode_file_name, table.image_names))
    own = {row: photos[names[row], table.sha256s[row]] for row in rows}
    column_ids = {name: _get_or_create(connection, facet_columns, model_id=model_id, name=name) for name in columns}
    stored = [
        {"prediction_id": id_, "columns": values}
        for row, (id_, _) in own.items()
        if (values := {name: column[row] for name, column in columns.items() if column[row]})
    ]
    links: list[dict[str, int]] = []
    for facet in facets:
        value_ids = {
            value: _get_or_create(
                connection, facet_values, {"position": position}, column_id=column_ids[facet.name], value=value
            )
            for position, value in enumerate(facet.order)
        }
        links += [
            {"facet_value_id": value_ids[value], "prediction_id": id_, "bucket_id": bucket_id}
            for row, (id_, bucket_id) in own.items()
            for value in (_kinds(facet.values[row]) if facet.name == ODD_FILE else [facet.values[row]])
        ]
    for target, all_rows in ((photo_columns, stored), (photo_facets, links)):
        for start in range(0, len(all_rows), CHUNK_ROWS):
            connection.execute(insert(target), all_rows[start : start + CHUNK_ROWS])


def has_groups(connection: Connection, model_id: int) -> bool:
    """Return whether the photos of a model come in groups, such as those of one patient."""
    own = facet_columns.c.model_id == model_id, facet_columns.c.name == GROUP_COLUMN
    return connection.execute(select(facet_columns.c.id).where(*own)).first() is not None


def list_columns(connection: Connection, model_id: int) -> list[str]:
    """Return the names of a model's columns, in the order of the table."""
    named = select(facet_columns.c.name).where(facet_columns.c.model_id == model_id).order_by(facet_columns.c.id)
    return list(connection.execute(named).scalars())


def load_columns(connection: Connection, photo_ids: Sequence[int]) -> dict[int, dict[str, str]]:
    """Return the values of photos that are not empty, by the photo's id and the column's name."""
    rows = select(photo_columns).where(photo_columns.c.prediction_id.in_(photo_ids))
    return {row.prediction_id: dict(row.columns) for row in connection.execute(rows)}


def list_values(connection: Connection, model_id: int) -> list[FacetValue]:
    """Return the values of all facets of a model, by column and in the order to show them."""
    rows = (
        select(facet_values.c.id, facet_columns.c.name, facet_values.c.value)
        .join(facet_columns, facet_values.c.column_id == facet_columns.c.id)
        .where(facet_columns.c.model_id == model_id)
        .order_by(facet_columns.c.id, facet_values.c.position, facet_values.c.id)
    )
    return [FacetValue(row[0], row[1], row[2]) for row in connection.execute(rows)]


@dataclass(frozen=True)
class ColumnFilter:
    """The photos with one of some values of a column, as conditions for either end of a query."""

    value_ids: Sequence[int]

    @property
    def photo_ids(self) -> Select[Any]:
        """Select the ids of the photos. Good for few of them, as a database collects the ids first."""
        return select(photo_facets.c.prediction_id).where(photo_facets.c.facet_value_id.in_(self.value_ids))

    @property
    def contains_prediction(self) -> ColumnElement[bool]:
        """The condition of a row of ``predictions``, checked one by one. Good for a page of many photos."""
        own = photo_facets.c.facet_value_id.in_(self.value_ids), photo_facets.c.prediction_id == predictions.c.id
        return select(1).select_from(photo_facets).where(*own).correlate(predictions).exists()


def filter_by_column(values: Sequence[FacetValue], keys: Sequence[str]) -> dict[str, ColumnFilter]:
    """Return a filter for each column that ``keys`` have values of. Values of one column are alternatives."""
    known = {value.key: value for value in values}
    selected: dict[str, list[int]] = defaultdict(list)
    for key in keys:
        value = known.get(key)
        selected[value.column if value else key] += [value.id] if value else []
    return {column: ColumnFilter(ids) for column, ids in selected.items()}


def count_by_bucket(connection: Connection, column: ColumnFilter, others: Sequence[Select[Any]]) -> dict[int, int]:
    """Count the photos of a column's filter that all of ``others`` select, by their bucket."""
    link = photo_facets.c
    own = link.facet_value_id.in_(column.value_ids), *(link.prediction_id.in_(ids) for ids in others)
    return {
        row[0]: row[1] for row in connection.execute(select(link.bucket_id, func.count()).where(*own).group_by(link.bucket_id))
    }


def count_values(
    connection: Connection,
    values: Sequence[FacetValue],
    *,
    bucket_ids: Sequence[int] | None,
    photo_ids: Sequence[Select[Any]],
) -> dict[int, int]:
    """Count photos by the id of the value.

    Args:
        connection: A transaction.
        values: The values.
        bucket_ids: Count the photos of these buckets only. None: of all.
        photo_ids: Count the photos that all of these select.
    """
    link = photo_facets.c
    own = [link.facet_value_id.in_([value.id for value in values]), *(link.prediction_id.in_(ids) for ids in photo_ids)]
    if bucket_ids is not None:
        own.append(link.bucket_id.in_(bucket_ids))
    rows = connection.execute(select(link.facet_value_id, func.count()).where(*own).group_by(link.facet_value_id))
    return {row[0]: row[1] for row in rows}


def _kinds(text: str) -> list[str]:
    """Split what is odd about a file: "dark, odd shape"."""
    return text.split(", ") if text else []


def _columns(table: Predictions) -> dict[str, Sequence[str]]:
    groups = {GROUP_COLUMN: table.groups} if any(table.groups) else {}
    return {**groups, **table.facets}


def _get_or_create(connection: Connection, target: Table, more: Mapping[str, Any] | None = None, **key: Any) -> int:
    """Return the id of the row with this unique ``key``, which is inserted if it is new."""
    known = connection.execute(select(target.c.id).where(*(target.c[name] == value for name, value in key.items()))).scalar()
    if known is not None:
        return int(known)
    return int(connection.execute(insert(target).values(**key, **(more or {}))).inserted_primary_key[0])  # type: ignore[index]
