"""The tables. The migrations create them; a test compares the two.

Counts use a star schema. A row of ``buckets`` is one combination of everything that a page filters by, with the number of its
predictions, and a prediction refers to its bucket. Every count of a page is therefore a sum over buckets (a few thousand for
a million predictions), and a review moves a prediction from one bucket to another.
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
    """A time in UTC. SQLite stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and (value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc))


UNKNOWN = -1  # the label and the loss of a production photo without a label
RANGE_COLUMNS = ("loss", "confidence", "margin", "photo")  # a bucket stores the lowest and highest value of each

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)
PathText = Text().with_variant(Text(collation="C"), "postgresql")  # sorted by code points in both databases
PrimaryKey = BigInteger().with_variant(Integer, "sqlite")  # SQLite only increments an INTEGER

models = Table(
    "models",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("version", String(64), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("classes", JSON, nullable=False),
    Column("last_active_at", UtcDateTime, nullable=False),
)

imports = Table(  # the evaluations that were imported
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
    Column("label", SmallInteger, nullable=False),  # indexes the model's classes; UNKNOWN without a label
    Column("predicted", SmallInteger, nullable=False),
    Column("percent", SmallInteger, nullable=False),  # the confidence, rounded down, at most 99
    Column("review", String(16), nullable=False),  # unreviewed, confirmed, relabeled, neither or bad
    Column("duplicate", Boolean, nullable=False),  # a near duplicate has another label
    Column("mislabeled", Boolean, nullable=False),  # see models.artifacts.label_issues
    Column("unlike", Boolean, nullable=False),  # the photo is unlike the training images
    Column("images", Integer, nullable=False),
    # The range of its photos, which never shrinks; null before the first photo. See service/db/pagination.py.
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
        "unlike",
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
    Column("margin", Double, nullable=False),  # between the two highest probabilities
    Column("shuffle", Integer, nullable=False),  # 31 bits of the photo's sha256: a random order
    Column("probabilities", LargeBinary, nullable=False),  # little-endian float32, in the order of the model's classes
    Column("received_at", UtcDateTime),  # of a production photo
    Column("ood_score", Double),  # null for a model without the score
    UniqueConstraint("model_id", "photo", "sha256"),
    # One per sort order. Each includes the bucket, so that a filter needs the index alone.
    Index("ix_predictions_loss", "model_id", "loss", "id", "bucket_id"),
    Index("ix_predictions_confidence", "model_id", "confidence", "id", "bucket_id"),
    Index("ix_predictions_margin", "model_id", "margin", "id", "bucket_id"),
    Index("ix_predictions_photo", "model_id", "photo", "id", "bucket_id"),
    Index("ix_predictions_shuffle", "model_id", "shuffle", "id", "bucket_id"),
    Index("ix_predictions_bucket", "bucket_id", "shuffle", "id"),  # small results, and the random order
    Index("ix_predictions_sha256", "sha256"),
)

decisions = Table(  # append-only: every review, note and undo
    "decisions",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("photo", Text, nullable=False),
    Column("label", Text),  # the label at the time of the review
    Column("decision", String(16), nullable=False),  # label, neither, bad, note or undo
    Column("new_label", Text),
    Column("note", Text, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("key_name", Text),
    Column("model_version", String(64), nullable=False),
    Column("undoes", PrimaryKey, ForeignKey("decisions.id")),
    Column("decided_at", UtcDateTime, nullable=False),
    Column("batch", PrimaryKey, index=True),  # of decisions that were saved together; see service/reviews/batch.py
)

current_reviews = Table(  # the current review of each photo
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

production_images = Table(  # the images of saved production predictions
    "production_images",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("received_at", UtcDateTime, nullable=False, index=True),
)

facet_columns = Table(  # the further columns of a table of labels
    "facet_columns",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("model_id", PrimaryKey, ForeignKey("models.id"), nullable=False),
    Column("name", Text, nullable=False),
    UniqueConstraint("model_id", "name"),
)

facet_values = Table(  # the values of a column that photos are filtered by
    "facet_values",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("column_id", PrimaryKey, ForeignKey("facet_columns.id"), nullable=False),
    Column("value", Text, nullable=False),
    Column("position", Integer, nullable=False),  # in the list of the column's values
    UniqueConstraint("column_id", "value"),
)

photo_facets = Table(
    "photo_facets",
    metadata,
    Column("facet_value_id", PrimaryKey, ForeignKey("facet_values.id"), primary_key=True),
    Column("prediction_id", PrimaryKey, ForeignKey("predictions.id"), primary_key=True, index=True),
    Column("bucket_id", PrimaryKey, ForeignKey("buckets.id"), nullable=False),  # that of the prediction
    Index("ix_photo_facets_bucket", "facet_value_id", "bucket_id", "prediction_id"),  # counts need the index alone
)

photo_columns = Table(  # all values of a photo, to be shown
    "photo_columns",
    metadata,
    Column("prediction_id", PrimaryKey, ForeignKey("predictions.id"), primary_key=True),
    Column("columns", JSON, nullable=False),
)

training_jobs = Table(  # the training runs of the studio
    "training_jobs",
    metadata,
    Column("id", PrimaryKey, primary_key=True),
    Column("run", String(64), nullable=False, unique=True),  # the folder of the run
    Column("state", String(16), nullable=False, index=True),  # queued, running, finished, failed or cancelled
    Column("settings", JSON, nullable=False),  # of `finetune train`, by name
    Column("data", Text, nullable=False),  # how the form names the data
    Column("reviews", Integer, nullable=False),  # number of reviews that are applied
    Column("actor", Text, nullable=False),  # who started it
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("interruptions", Integer, nullable=False),  # how often its process was killed
    Column("is_cancelled", Boolean, nullable=False),  # whether it has to stop
    Column("reason", Text),  # why it failed or was interrupted
    Column("version", String(64)),  # of the bundle of a finished run
    Column("speed", JSON),  # seconds of the phases of a finished run
    Column("runner", String(64)),  # the process that runs it
    Column("lease_until", UtcDateTime),  # until when it may not be taken over
    sqlite_autoincrement=True,  # a page of a deleted run must not show another one
)
