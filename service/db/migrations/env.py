"""Run by Alembic, on the connection that ``service.db.connection`` gives it."""

from __future__ import annotations

from alembic import context

from service.db.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
