"""The tables. ``service/migrations`` makes them; a test holds the two against each other.

What can be counted is a star: a row of ``buckets`` is one combination of everything that a page filters by, with the number of
its predictions, and a prediction names its cell. So every count of a page is a sum over cells, of which a million predictions
have a few thousand, and a decision moves one prediction from one cell to another.
"""

from __future__ import annotations

from datetime import datetime, timezone

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, always with its time zone: SQLite keeps none, and what is kept here is UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and (value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc))


UNKNOWN = -1  # the label of a live photo that nobody has labelled, and its loss
RANGE_COLUMNS = (
    "loss",
    "confidence",
    "margin",
    "photo",
)  # the columns of predictions of which a cell knows how far its own reach


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)
PathText = Text().with_variant(Text(collation="C"), "postgresql")  # in the same order everywhere: by code points
PrimaryKey = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up an INTEGER alone

models = Table(
    "models",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("version", String(64), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("classes", JSON, nullable=False),
    Column("last_active_at", UtcDateTime, nullable=False),
)

imports = Table(  # which tables of predictions were read already
    "imports",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("model_id", PrimaryKey, ForeignKey("models.id"), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("source", String(16), nullable=False),
    Column("images", Integer, nullable=False),
    Column("imported_at", UtcDateTime, nullable=False),
    UniqueConstraint("model_id", "digest"),
)

buckets = Table(
    "buckets",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("model_id", PrimaryKey, ForeignKey("models.id"), nullable=False),
    Column("source", String(16), nullable=False),  # evaluation, out-of-fold or production
    Column("split", Text, nullable=False),
    Column("label", SmallInteger, nullable=False),  # indexes the model's classes; UNKNOWN where nobody has said
    Column("predicted", SmallInteger, nullable=False),
    Column("percent", SmallInteger, nullable=False),  # the confidence, rounded down, 99 at most
    Column("review", String(16), nullable=False),  # unreviewed, confirmed, relabeled, neither or bad
    Column("duplicate", Boolean, nullable=False),  # looks like a photo with another label
    Column("mislabeled", Boolean, nullable=False),  # probably: see models.artifacts.label_issues
    Column("images", Integer, nullable=False),
    # Between which values its photos lie, or lay once; nulls before the first. See service/db/key_ranges.py.
    *(Column(f"{name}_{end}", PathText if name == "photo" else Double) for name in RANGE_COLUMNS for end in ("low", "high")),
    UniqueConstraint(
        "model_id",
        "source",
        "split",
        "label",
        "predicted",
        "percent",
        "review",
        "duplicate",
        "mislabeled",
        name="uq_buckets_dimensions",
    ),
)

predictions = Table(
    "predictions",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("model_id", PrimaryKey, ForeignKey("models.id"), nullable=False),
    Column("bucket_id", PrimaryKey, ForeignKey("buckets.id"), nullable=False),
    Column("photo", PathText, nullable=False),  # relative to the data folder, as in predictions.csv
    Column("sha256", String(64), nullable=False),
    Column("loss", Double, nullable=False),
    Column("confidence", Double, nullable=False),
    Column("margin", Double, nullable=False),  # of the two highest probabilities
    Column("shuffle", Integer, nullable=False),  # 31 bits of the photo's sha256: an order that has nothing to do with others
    Column("probabilities", LargeBinary, nullable=False),  # little-endian float32, in the order of the model's classes
    UniqueConstraint("model_id", "photo", "sha256"),
    # One for each order of a grid. The cell is in each, so that a filter is answered from the index alone.
    Index("ix_predictions_loss", "model_id", "loss", "id", "bucket_id"),
    Index("ix_predictions_confidence", "model_id", "confidence", "id", "bucket_id"),
    Index("ix_predictions_margin", "model_id", "margin", "id", "bucket_id"),
    Index("ix_predictions_photo", "model_id", "photo", "id", "bucket_id"),
    Index("ix_predictions_shuffle", "model_id", "shuffle", "id", "bucket_id"),
    Index("ix_predictions_bucket", "bucket_id", "shuffle", "id"),  # few photos, and a random order of some
    Index("ix_predictions_sha256", "sha256"),
)

decisions = Table(  # append only: what anybody ever decided, and took back
    "decisions",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("photo", Text, nullable=False),
    Column("label", Text),  # what the photo was labelled when it was decided
    Column("decision", String(16), nullable=False),  # label, neither, bad, note or undo
    Column("new_label", Text),
    Column("note", Text, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("key_name", Text),
    Column("model_version", String(64), nullable=False),
    Column("undoes", PrimaryKey, ForeignKey("decisions.id")),
    Column("decided_at", UtcDateTime, nullable=False),
)

current_reviews = Table(  # what holds of each photo; training reads it, so its columns do not change
    "current_reviews",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("photo", PathText, nullable=False),
    Column("label", Text),
    Column("decision", String(16), nullable=False),  # label, neither or bad
    Column("new_label", Text),
    Column("note", Text, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("decided_at", UtcDateTime, nullable=False),
    Column("decision_id", PrimaryKey, ForeignKey("decisions.id"), nullable=False),
)

production_images = Table(  # the photos behind live predictions, where the operator keeps them
    "production_images",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("received_at", UtcDateTime, nullable=False, index=True),
)
