"""Receipts tell which trace a call belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("receipts", sa.Column("trace_id", sa.Text, nullable=False, server_default=""))
