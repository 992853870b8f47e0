"""Store the bucket of each photo with the values of its columns, so that filters and counts read one index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

PRIMARY_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SAVED = (
    "CREATE TEMPORARY TABLE saved_photo_facets AS SELECT facet_value_id, prediction_id, predictions.bucket_id AS bucket_id "
    "FROM photo_facets JOIN predictions ON predictions.id = prediction_id"
)


def upgrade() -> None:
    op.execute(SAVED)
    op.drop_table("photo_facets")
    _create_table(
        sa.Column("bucket_id", PRIMARY_KEY, nullable=False),
        sa.ForeignKeyConstraint(["bucket_id"], ["buckets.id"], name="fk_photo_facets_bucket_id"),
    )
    op.create_index("ix_photo_facets_bucket", "photo_facets", ["facet_value_id", "bucket_id", "prediction_id"])
    _restore("facet_value_id, prediction_id, bucket_id")


def downgrade() -> None:
    op.execute(SAVED.replace("predictions.bucket_id", "photo_facets.bucket_id"))
    op.drop_table("photo_facets")
    _create_table()
    _restore("facet_value_id, prediction_id")


def _create_table(*more: sa.schema.SchemaItem) -> None:
    op.create_table(
        "photo_facets",
        sa.Column("facet_value_id", PRIMARY_KEY, nullable=False),
        sa.Column("prediction_id", PRIMARY_KEY, nullable=False),
        *more,
        sa.PrimaryKeyConstraint("facet_value_id", "prediction_id", name="pk_photo_facets"),
        sa.ForeignKeyConstraint(["facet_value_id"], ["facet_values.id"], name="fk_photo_facets_facet_value_id"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_photo_facets_prediction_id"),
    )
    op.create_index("ix_photo_facets_prediction_id", "photo_facets", ["prediction_id"])


def _restore(columns: str) -> None:
    op.execute(f"INSERT INTO photo_facets ({columns}) SELECT {columns} FROM saved_photo_facets")
    op.execute("DROP TABLE saved_photo_facets")
