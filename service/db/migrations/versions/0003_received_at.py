"""Store the time of arrival with each production prediction."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("predictions", sa.Column("received_at", sa.DateTime(timezone=True), nullable=True))
    op.execute(
        "UPDATE predictions SET received_at = "
        "(SELECT received_at FROM production_images WHERE production_images.sha256 = predictions.sha256) "
        "WHERE photo = 'production/' || substr(sha256, 1, 16)"
    )


def downgrade() -> None:
    op.drop_column("predictions", "received_at")
