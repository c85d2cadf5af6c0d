"""Markups, budgets, and which keys share one."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything."""
    op.add_column("api_keys", sa.Column("root_id", sa.Text))
    op.add_column("receipts", sa.Column("markup_bps", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "account_terms",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("markup_bps", sa.Integer, nullable=False),
        sa.Column("changed_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_account_terms"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_account_terms_user_id"),
    )
    op.create_table(
        "budgets",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("window_s", sa.Integer, nullable=False),
        sa.Column("limit_nanousd", sa.BigInteger, nullable=False),
        sa.Column("is_admins", sa.Boolean, nullable=False),
        sa.Column("window_number", sa.BigInteger, nullable=False),
        sa.Column("spent_nanousd", sa.BigInteger, nullable=False),
        sa.Column("told_percent", sa.Integer, nullable=False),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_budgets"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_budgets_user_id"),
        sa.UniqueConstraint(
            "user_id", "key_id", "window_s", "is_admins", name="uq_budgets_user_id_key_id_window_s_is_admins"
        ),
        sa.CheckConstraint("limit_nanousd > 0", name=op.f("ck_budgets_limit_is_positive")),
    )
