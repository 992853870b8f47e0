"""Rename tables, columns and values; all rows are kept."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


class Names(NamedTuple):
    """What differs between the revisions."""

    buckets: str
    bucket_id: str
    bucket_index: str
    unique: str
    images: str
    mislabeled: str
    relabeled: str
    production_images: str
    production: str  # the source of predictions, and the prefix of their names
    last_active_at: str


OLD = Names("cells", "cell_id", "ix_predictions_cell", "uq_cells_everything", "photos", "mislabelled", "relabelled",
            "live_photos", "live", "seen_at")  # fmt: skip
NEW = Names("buckets", "bucket_id", "ix_predictions_bucket", "uq_buckets_dimensions", "images", "mislabeled", "relabeled",
            "production_images", "production", "last_active_at")  # fmt: skip
SORTED_BY = ("loss", "confidence", "margin", "photo", "shuffle")
RANGES = tuple(f"{name}_{end}" for name in ("loss", "confidence", "margin") for end in ("low", "high"))


def upgrade() -> None:
    _rename(OLD, NEW)


def downgrade() -> None:
    _rename(NEW, OLD)


def _rename(old: Names, new: Names) -> None:
    """Copy the tables whose constraints have other names, as SQLite cannot rename those, and alter the others."""
    _copy_production_images(old, new)
    _copy_buckets(old, new)
    _alter_predictions(old, new)
    op.drop_table(old.buckets)
    op.execute(f"ALTER TABLE imports RENAME COLUMN {old.images} TO {new.images}")
    op.execute(f"ALTER TABLE models RENAME COLUMN {old.last_active_at} TO {new.last_active_at}")
    for table in ("predictions", "decisions", "current_reviews"):
        op.execute(
            f"UPDATE {table} SET photo = '{new.production}/' || substr(sha256, 1, 16) "
            f"WHERE photo = '{old.production}/' || substr(sha256, 1, 16)"
        )


def _copy_production_images(old: Names, new: Names) -> None:
    op.create_table(
        new.production_images,
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f(f"pk_{new.production_images}")),
    )
    columns = "sha256, data, received_at"
    op.execute(f"INSERT INTO {new.production_images} ({columns}) SELECT {columns} FROM {old.production_images}")
    op.drop_table(old.production_images)
    op.create_index(op.f(f"ix_{new.production_images}_received_at"), new.production_images, ["received_at"])


def _copy_buckets(old: Names, new: Names) -> None:
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    path = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    dimensions = ("source", "split", "label", "predicted", "percent", "review", "duplicate")
    op.create_table(
        new.buckets,
        sa.Column("id", key, nullable=False),
        sa.Column("model_id", key, nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("label", sa.SmallInteger(), nullable=False),
        sa.Column("predicted", sa.SmallInteger(), nullable=False),
        sa.Column("percent", sa.SmallInteger(), nullable=False),
        sa.Column("review", sa.String(length=16), nullable=False),
        sa.Column("duplicate", sa.Boolean(), nullable=False),
        sa.Column(new.mislabeled, sa.Boolean(), nullable=False),
        sa.Column(new.images, sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=True) for name in RANGES),
        sa.Column("photo_low", path, nullable=True),
        sa.Column("photo_high", path, nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f(f"fk_{new.buckets}_model_id")),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{new.buckets}")),
        sa.UniqueConstraint("model_id", *dimensions, new.mislabeled, name=new.unique),
    )
    same = ", ".join(("id", "model_id", "split", "label", "predicted", "percent", "duplicate", *RANGES))
    is_production = f"CASE source WHEN '{old.production}' THEN '{new.production}"
    op.execute(
        f"INSERT INTO {new.buckets} ({same}, {new.mislabeled}, {new.images}, source, review, photo_low, photo_high) "
        f"SELECT {same}, {old.mislabeled}, {old.images}, {is_production}' ELSE source END, "
        f"CASE review WHEN '{old.relabeled}' THEN '{new.relabeled}' ELSE review END, "
        f"{is_production}/' || substr(photo_low, {len(old.production) + 2}) ELSE photo_low END, "
        f"{is_production}/' || substr(photo_high, {len(old.production) + 2}) ELSE photo_high END FROM {old.buckets}"
    )
    if op.get_bind().dialect.name == "postgresql":  # the copied ids did not count up its sequence
        op.execute(
            f"SELECT setval(pg_get_serial_sequence('{new.buckets}', 'id'), "
            f"(SELECT coalesce(max(id), 0) + 1 FROM {new.buckets}), "
            "false)"
        )


def _alter_predictions(old: Names, new: Names) -> None:
    for name in SORTED_BY:
        op.drop_index(f"ix_predictions_{name}", "predictions")
    op.drop_index(old.bucket_index, "predictions")
    op.execute(f"ALTER TABLE predictions RENAME COLUMN {old.bucket_id} TO {new.bucket_id}")
    with op.batch_alter_table("predictions") as batch:
        batch.drop_constraint(f"fk_predictions_{old.bucket_id}", type_="foreignkey")
        batch.create_foreign_key(f"fk_predictions_{new.bucket_id}", new.buckets, [new.bucket_id], ["id"])
    for name in SORTED_BY:
        op.create_index(f"ix_predictions_{name}", "predictions", ["model_id", name, "id", new.bucket_id])
    op.create_index(new.bucket_index, "predictions", [new.bucket_id, "shuffle", "id"])
