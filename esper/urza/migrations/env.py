"""Run by alembic for each of its commands. There is no offline mode: rows are migrated as well."""

from alembic import context

from esper.urza.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
