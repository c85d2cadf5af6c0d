"""One more bound of a key: the MCP tools it may use."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("api_keys", sa.Column("tools", sa.JSON(none_as_null=True)))
