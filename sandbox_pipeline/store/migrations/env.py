"""Alembic's entry: runs the migrations on the connection that the store hands over."""

from alembic import context

from sandbox_pipeline.store.engine import VERSION_TABLE
from sandbox_pipeline.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
