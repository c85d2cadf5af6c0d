"""Rentals: the key whose budgets bound one."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("rentals", sa.Column("key_id", sa.Text, nullable=False, server_default=""))
