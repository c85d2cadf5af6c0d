"""Money that comes in and goes back: payments, what providers told of them, what renews itself."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    text,
)

from gpuproxy.store.schema.base import UtcTime, metadata

_is_renewing = text("kind = 'renewal' AND state = 'pending'")

# `reference` is the provider's name for it. `amount` was asked for, `paid` came in, of which `refunded` went back.
# `due_at`: when a charge whose outcome is unknown is to be asked for again.
payments = Table(
    "payments",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("provider", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("paid_nanousd", BigInteger, nullable=False, server_default="0"),
    Column("refunded_nanousd", BigInteger, nullable=False, server_default="0"),
    Column("reference", Text, nullable=False, server_default=""),
    Column("checkout_url", Text, nullable=False, server_default=""),
    Column("instructions", Text, nullable=False, server_default=""),
    Column("reason", Text, nullable=False, server_default=""),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Column("completed_at", UtcTime),
    CheckConstraint("amount_nanousd > 0", name="amount_is_positive"),
    CheckConstraint("refunded_nanousd >= 0 AND refunded_nanousd <= paid_nanousd", name="refund_fits"),
    Index(None, "user_id", "created_at"),
    Index(None, "provider", "reference"),
    Index(None, "state", "created_at"),
    Index(None, "due_at", sqlite_where=text("due_at IS NOT NULL"), postgresql_where=text("due_at IS NOT NULL")),
    # One renewal at a time: whatever happens and on however many nodes, nobody is charged twice for one shortfall.
    Index(
        "uq_payments_one_pending_renewal",
        "user_id",
        unique=True,
        sqlite_where=_is_renewing,
        postgresql_where=_is_renewing,
    ),
)

# What providers told, each event once. `payment_id` is NULL while no payment of ours is known by its reference.
payment_events = Table(
    "payment_events",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("payment_id", Text, ForeignKey("payments.id"), index=True),
    Column("reference", Text, nullable=False),
    Column("content", JSON, nullable=False),
    Column("at", UtcTime, nullable=False),
    Index(
        "ix_payment_events_waiting",
        "provider",
        "reference",
        sqlite_where=text("payment_id IS NULL"),
        postgresql_where=text("payment_id IS NULL"),
    ),
)

# Money that went back, by refund or dispute: of `amount`, `taken` came out of the customer's credit, the rest of
# ours. A failed one was given again.
payment_reversals = Table(
    "payment_reversals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("payment_id", Text, ForeignKey("payments.id"), nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("taken_nanousd", BigInteger, nullable=False),
    Column("reference", Text, nullable=False, server_default=""),
    Column("reason", Text, nullable=False, server_default=""),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    CheckConstraint("taken_nanousd >= 0 AND taken_nanousd <= amount_nanousd", name="parts_fit"),
    Index(None, "reference"),
    Index(None, "due_at", sqlite_where=text("due_at IS NOT NULL"), postgresql_where=text("due_at IS NOT NULL")),
)

# How a customer may be charged while away, in the provider's own words; never a card number.
payment_methods = Table(
    "payment_methods",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("provider", Text, primary_key=True),
    Column("method", Text, nullable=False),
    Column("saved_at", UtcTime, nullable=False),
)

# Whose credit is topped up, from what on, by how much, and no more than what in a month.
auto_renewals = Table(
    "auto_renewals",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("provider", Text, nullable=False),
    Column("is_enabled", Boolean, nullable=False),
    Column("threshold_nanousd", BigInteger, nullable=False),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("monthly_cap_nanousd", BigInteger, nullable=False),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("next_attempt_at", UtcTime),
    Column("reason", Text, nullable=False, server_default=""),
    Column("updated_at", UtcTime, nullable=False),
    CheckConstraint("amount_nanousd > 0 AND threshold_nanousd >= 0", name="amounts_are_positive"),
)
