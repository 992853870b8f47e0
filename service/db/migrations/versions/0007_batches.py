"""Store which decisions were saved together, so that they can be undone together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

INDEX = "ix_decisions_batch"


def upgrade() -> None:
    op.add_column("decisions", sa.Column("batch", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=True))
    op.create_index(INDEX, "decisions", ["batch"])


def downgrade() -> None:
    op.drop_index(INDEX, "decisions")
    op.drop_column("decisions", "batch")
