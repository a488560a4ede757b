"""The first schema."""

from alembic import op

from sandbox_pipeline.store.tables import metadata

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables. Later revisions must not use the live metadata but spell out changes."""
    metadata.create_all(op.get_bind())
