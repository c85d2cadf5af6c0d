"""How providers are, and what is amiss with them."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "provider_looks",
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("looked_at", UtcTime),
        sa.Column("listed_at", UtcTime),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("instance_count", sa.Integer, nullable=False),
        sa.Column("compared_until", UtcTime),
        sa.Column("compare_error", sa.Text, nullable=False),
        sa.Column("comparison", sa.JSON),
        sa.PrimaryKeyConstraint("provider", name="pk_provider_looks"),
    )
    op.create_table(
        "fleet_findings",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("subject_id", sa.Text, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.Column("resolved_at", UtcTime),
        sa.Column("acknowledged_at", UtcTime),
        sa.PrimaryKeyConstraint("id", name="pk_fleet_findings"),
        sa.UniqueConstraint("provider", "kind", "subject_id", name="uq_fleet_findings_provider_kind_subject_id"),
    )
    op.create_index("ix_fleet_findings_created_at", "fleet_findings", ["created_at"])
