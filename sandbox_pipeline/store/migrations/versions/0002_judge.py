"""What the judge cost."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, unless the first revision made it: that makes the tables as they are now."""
    table, name = "orchestration_summary", "judge_cost_usd"
    if name not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}:
        op.add_column(table, sa.Column(name, sa.Float))
