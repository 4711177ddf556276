"""Alembic runs this file for every command; here it uses the connection and the transaction of ``migrate``."""

from __future__ import annotations

from alembic import context

from kinema.jobs.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
