"""Store the OOD score of each prediction, and in the buckets whether the photos are unlike the training images."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

DIMENSIONS = ("model_id", "source", "split", "label", "predicted", "percent", "review", "duplicate", "mislabeled")
RANGES = ("loss", "confidence", "margin", "photo")
CHILDREN = ("photo_facets", "photo_columns")
UNIQUE, FOREIGN_KEY = "uq_buckets_dimensions", "fk_predictions_bucket_id"


def upgrade() -> None:
    op.add_column("predictions", sa.Column("ood_score", sa.Double(), nullable=True))
    if op.get_bind().dialect.name == "sqlite":
        _recreate_buckets([*DIMENSIONS, "unlike"], values={"unlike": "0"})
        return
    op.add_column("buckets", sa.Column("unlike", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.alter_column("buckets", "unlike", server_default=None)
    op.drop_constraint(UNIQUE, "buckets", type_="unique")
    op.create_unique_constraint(UNIQUE, "buckets", [*DIMENSIONS, "unlike"])


def downgrade() -> None:
    _merge_buckets()
    if op.get_bind().dialect.name == "sqlite":
        _recreate_buckets([*DIMENSIONS])
    else:
        op.drop_constraint(UNIQUE, "buckets", type_="unique")
        op.drop_column("buckets", "unlike")
        op.create_unique_constraint(UNIQUE, "buckets", [*DIMENSIONS])
    op.drop_column("predictions", "ood_score")


def _merge_buckets() -> None:
    """Merge buckets that differ in ``unlike`` alone."""
    same = ", ".join(DIMENSIONS)
    ends = [f"{name}_{end}" for name in RANGES for end in ("low", "high")]
    totals = ", ".join(f"{'MIN' if name.endswith('_low') else 'MAX'}({name}) AS {name}" for name in ends)
    op.execute(
        f"UPDATE predictions SET bucket_id = same.first_id FROM "
        f"(SELECT id, MIN(id) OVER (PARTITION BY {same}) AS first_id FROM buckets) AS same "
        "WHERE predictions.bucket_id = same.id"
    )
    op.execute(
        f"UPDATE buckets SET images = same.images, {', '.join(f'{name} = same.{name}' for name in ends)} FROM "
        f"(SELECT MIN(id) AS first_id, SUM(images) AS images, {totals} FROM buckets GROUP BY {same}) AS same "
        "WHERE buckets.id = same.first_id"
    )
    op.execute(f"DELETE FROM buckets WHERE id NOT IN (SELECT MIN(id) FROM buckets GROUP BY {same})")


def _recreate_buckets(dimensions: list[str], values: dict[str, str] | None = None) -> None:
    """Replace the table, as SQLite cannot change a constraint, and must not drop a table that another one refers to."""
    op.rename_table("buckets", "previous_buckets")
    types: dict[str, Any] = {
        "model_id": sa.Integer(), "source": sa.String(length=16), "split": sa.Text(), "label": sa.SmallInteger(),
        "predicted": sa.SmallInteger(), "percent": sa.SmallInteger(), "review": sa.String(length=16),
    }  # fmt: skip
    ends = [f"{name}_{end}" for name in RANGES for end in ("low", "high")]
    op.create_table(
        "buckets",
        sa.Column("id", sa.Integer(), nullable=False),
        *(sa.Column(name, types.get(name, sa.Boolean()), nullable=False) for name in dimensions),
        sa.Column("images", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Text() if name.startswith("photo") else sa.Double(), nullable=True) for name in ends),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_buckets_model_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_buckets")),
        sa.UniqueConstraint(*dimensions, name=UNIQUE),
    )
    columns = ["id", *dimensions, "images", *ends]
    sources = [(values or {}).get(name, name) for name in columns]
    op.execute(f"INSERT INTO buckets ({', '.join(columns)}) SELECT {', '.join(sources)} FROM previous_buckets")
    for table in CHILDREN:  # nothing may refer to a prediction while its table is replaced
        op.execute(f"CREATE TEMPORARY TABLE saved_{table} AS SELECT * FROM {table}")
        op.execute(f"DELETE FROM {table}")
    with op.batch_alter_table("predictions") as batch:
        batch.drop_constraint(FOREIGN_KEY, type_="foreignkey")
        batch.create_foreign_key(FOREIGN_KEY, "buckets", ["bucket_id"], ["id"])
    op.drop_table("previous_buckets")
    for table in CHILDREN:
        op.execute(f"INSERT INTO {table} SELECT * FROM saved_{table}")
        op.execute(f"DROP TABLE saved_{table}")
