"""Overdrafts, holds, prices, and what a call cost."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything."""
    # By hand: SQLite adds a constraint to a table only together with a column.
    op.execute(
        """ALTER TABLE accounts ADD COLUMN overdraft_nanousd BIGINT DEFAULT 0 NOT NULL
        CONSTRAINT ck_accounts_credit_is_not_overspent
        CHECK (kind <> 'credit' OR posted_nanousd - held_nanousd >= -overdraft_nanousd)"""
    )
    op.add_column("transfers", sa.Column("charge_id", sa.Text, nullable=False, server_default=""))
    op.add_column("receipts", sa.Column("cost_nanousd", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("receipts", sa.Column("charge_id", sa.Text, nullable=False, server_default=""))
    _create_holds()
    _create_prices()


def _create_holds() -> None:
    op.create_table(
        "holds",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("account_id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("amount_nanousd", sa.BigInteger, nullable=False),
        sa.Column("remaining_nanousd", sa.BigInteger, nullable=False),
        sa.Column("posted_nanousd", sa.BigInteger, nullable=False),
        sa.Column("idempotency_key", sa.Text, nullable=False),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.Column("expires_at", UtcTime),
        sa.Column("resolved_at", UtcTime),
        sa.PrimaryKeyConstraint("id", name="pk_holds"),
        sa.UniqueConstraint("idempotency_key", name="uq_holds_idempotency_key"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_holds_account_id"),
        sa.CheckConstraint(
            "remaining_nanousd >= 0 AND posted_nanousd >= 0 AND posted_nanousd + remaining_nanousd <= amount_nanousd",
            name=op.f("ck_holds_parts_fit"),
        ),
        sa.CheckConstraint("state = 'pending' OR remaining_nanousd = 0", name=op.f("ck_holds_nothing_remains")),
    )
    op.create_index("ix_holds_account_id", "holds", ["account_id"])
    op.create_index("ix_holds_state_expires_at", "holds", ["state", "expires_at"])
    op.create_index("ix_holds_state_owner", "holds", ["state", "owner"])


def _create_prices() -> None:
    op.create_table(
        "prices",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("upstream", sa.Text, nullable=False),
        sa.Column("valid_from_ns", sa.BigInteger, nullable=False),
        sa.Column("input_nanousd_per_million", sa.BigInteger, nullable=False),
        sa.Column("cached_input_nanousd_per_million", sa.BigInteger, nullable=False),
        sa.Column("output_nanousd_per_million", sa.BigInteger, nullable=False),
        sa.Column("request_nanousd", sa.BigInteger, nullable=False),
        sa.Column("second_nanousd", sa.BigInteger, nullable=False),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("model", "upstream", "valid_from_ns", name="pk_prices"),
    )
