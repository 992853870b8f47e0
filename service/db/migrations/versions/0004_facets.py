"""Store the further columns of a table of labels."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

PRIMARY_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "facet_columns",
        sa.Column("id", PRIMARY_KEY, nullable=False),
        sa.Column("model_id", PRIMARY_KEY, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_facet_columns"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_facet_columns_model_id"),
        sa.UniqueConstraint("model_id", "name", name="uq_facet_columns_model_id_name"),
    )
    op.create_table(
        "facet_values",
        sa.Column("id", PRIMARY_KEY, nullable=False),
        sa.Column("column_id", PRIMARY_KEY, nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_facet_values"),
        sa.ForeignKeyConstraint(["column_id"], ["facet_columns.id"], name="fk_facet_values_column_id"),
        sa.UniqueConstraint("column_id", "value", name="uq_facet_values_column_id_value"),
    )
    op.create_table(
        "photo_facets",
        sa.Column("facet_value_id", PRIMARY_KEY, nullable=False),
        sa.Column("prediction_id", PRIMARY_KEY, nullable=False),
        sa.PrimaryKeyConstraint("facet_value_id", "prediction_id", name="pk_photo_facets"),
        sa.ForeignKeyConstraint(["facet_value_id"], ["facet_values.id"], name="fk_photo_facets_facet_value_id"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_photo_facets_prediction_id"),
    )
    op.create_index("ix_photo_facets_prediction_id", "photo_facets", ["prediction_id"])
    op.create_table(
        "photo_columns",
        sa.Column("prediction_id", PRIMARY_KEY, nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("prediction_id", name="pk_photo_columns"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_photo_columns_prediction_id"),
    )


def downgrade() -> None:
    for table in ("photo_columns", "photo_facets", "facet_values", "facet_columns"):
        op.drop_table(table)
