"""What Alembic runs for every command, here with the connection and in the transaction of ``migrate``."""

from __future__ import annotations

from alembic import context

from kinema.jobs.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
