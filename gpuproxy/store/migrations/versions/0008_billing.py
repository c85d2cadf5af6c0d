"""Payments, and what renews itself."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything."""
    _create_payments()
    _create_events()
    _create_reversals()
    _create_renewals()


def _index_where(name: str, table: str, columns: list[str], condition: str, unique: bool = False) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, unique=unique, sqlite_where=where, postgresql_where=where)


def _create_payments() -> None:
    op.create_table(
        "payments",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("amount_nanousd", sa.BigInteger, nullable=False),
        sa.Column("paid_nanousd", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("refunded_nanousd", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("reference", sa.Text, nullable=False, server_default=""),
        sa.Column("checkout_url", sa.Text, nullable=False, server_default=""),
        sa.Column("instructions", sa.Text, nullable=False, server_default=""),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("due_at", UtcTime),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.Column("completed_at", UtcTime),
        sa.PrimaryKeyConstraint("id", name="pk_payments"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_payments_user_id"),
        sa.CheckConstraint("amount_nanousd > 0", name=op.f("ck_payments_amount_is_positive")),
        sa.CheckConstraint(
            "refunded_nanousd >= 0 AND refunded_nanousd <= paid_nanousd", name=op.f("ck_payments_refund_fits")
        ),
    )
    op.create_index("ix_payments_user_id_created_at", "payments", ["user_id", "created_at"])
    op.create_index("ix_payments_provider_reference", "payments", ["provider", "reference"])
    op.create_index("ix_payments_state_created_at", "payments", ["state", "created_at"])
    _index_where("ix_payments_due_at", "payments", ["due_at"], "due_at IS NOT NULL")
    _index_where(
        "uq_payments_one_pending_renewal",
        "payments",
        ["user_id"],
        "kind = 'renewal' AND state = 'pending'",
        unique=True,
    )


def _create_events() -> None:
    op.create_table(
        "payment_events",
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("payment_id", sa.Text),
        sa.Column("reference", sa.Text, nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
        sa.Column("at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("provider", "id", name="pk_payment_events"),
        sa.ForeignKeyConstraint(["payment_id"], ["payments.id"], name="fk_payment_events_payment_id"),
    )
    op.create_index("ix_payment_events_payment_id", "payment_events", ["payment_id"])
    _index_where("ix_payment_events_waiting", "payment_events", ["provider", "reference"], "payment_id IS NULL")


def _create_reversals() -> None:
    op.create_table(
        "payment_reversals",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("payment_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("amount_nanousd", sa.BigInteger, nullable=False),
        sa.Column("taken_nanousd", sa.BigInteger, nullable=False),
        sa.Column("reference", sa.Text, nullable=False, server_default=""),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("due_at", UtcTime),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_payment_reversals"),
        sa.ForeignKeyConstraint(["payment_id"], ["payments.id"], name="fk_payment_reversals_payment_id"),
        sa.CheckConstraint(
            "taken_nanousd >= 0 AND taken_nanousd <= amount_nanousd", name=op.f("ck_payment_reversals_parts_fit")
        ),
    )
    op.create_index("ix_payment_reversals_payment_id", "payment_reversals", ["payment_id"])
    op.create_index("ix_payment_reversals_reference", "payment_reversals", ["reference"])
    _index_where("ix_payment_reversals_due_at", "payment_reversals", ["due_at"], "due_at IS NOT NULL")


def _create_renewals() -> None:
    op.create_table(
        "payment_methods",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("saved_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "provider", name="pk_payment_methods"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_payment_methods_user_id"),
    )
    op.create_table(
        "auto_renewals",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("is_enabled", sa.Boolean, nullable=False),
        sa.Column("threshold_nanousd", sa.BigInteger, nullable=False),
        sa.Column("amount_nanousd", sa.BigInteger, nullable=False),
        sa.Column("monthly_cap_nanousd", sa.BigInteger, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_attempt_at", UtcTime),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("updated_at", UtcTime, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_auto_renewals"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_auto_renewals_user_id"),
        sa.CheckConstraint(
            "amount_nanousd > 0 AND threshold_nanousd >= 0", name=op.f("ck_auto_renewals_amounts_are_positive")
        ),
    )
