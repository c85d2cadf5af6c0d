"""Upstreams and models set while running."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create them."""
    op.create_table(
        "routing_blocks",
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("block", sa.JSON, nullable=False),
        sa.Column("changed_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_routing_blocks"),
    )
