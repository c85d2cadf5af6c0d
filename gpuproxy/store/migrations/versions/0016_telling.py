"""What events need: sums of charges, thresholds of credit, receivers that asked for a pause."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything."""
    op.add_column("accounts", sa.Column("low_nanousd", sa.BigInteger))
    op.add_column("accounts", sa.Column("is_low_told", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("webhooks", sa.Column("rests_until", UtcTime))
    op.create_table(
        "usage_sums",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("wanted_until", UtcTime, nullable=False),
        sa.Column("since", UtcTime),
        sa.Column("call_count", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_nanousd", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_usage_sums"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_usage_sums_user_id"),
    )
