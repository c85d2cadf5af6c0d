"""Limits of a key: how far its calls may raise the limit of requests, and tokens per minute."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("api_keys", sa.Column("rpm_ceiling", sa.Integer))
    op.add_column("api_keys", sa.Column("tpm", sa.BigInteger))
