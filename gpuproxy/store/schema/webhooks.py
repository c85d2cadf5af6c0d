"""Who wants to be told of events by HTTP, and what became of each telling."""

from sqlalchemy import JSON, Column, ForeignKey, Index, Integer, LargeBinary, Table, Text, text

from gpuproxy.store.schema.base import Sequence, UtcTime, metadata

# Secrets are sealed. Each of `old_secrets` signs beside `secret` for a time, see `deliveries.OldSecret`.
webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("disabled_reason", Text, nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("old_secrets", JSON, nullable=False, server_default="[]"),
    Column("failing_since", UtcTime),  # of the first failure after the last success
    Column("rests_until", UtcTime),  # its receiver asked for nothing before that
    Column("created_at", UtcTime, nullable=False),
)

# One row for each event name as the customer spelled it.
webhook_events = Table(
    "webhook_events",
    metadata,
    Column("webhook_id", Text, ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Index(None, "name"),
)

# Made in the transaction of the event, so none is forgotten; `name` is the spelling the customer asked for.
deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", Sequence, primary_key=True, autoincrement=True),
    Column("webhook_id", Text, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("event_id", Text, ForeignKey("events.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", UtcTime, nullable=False),  # while it is being sent: when another sender may take it over
    Column("claim", Text, nullable=False),  # who is sending it
    Column("status", Integer, nullable=False),  # of the last answer; 0: none
    Column("error", Text, nullable=False),
    Column("duration_ms", Integer, nullable=False),
    Column("attempted_at", UtcTime),
    Column("created_at", UtcTime, nullable=False, index=True),
    Index(None, "webhook_id", "created_at", "id"),
    # What is over must not be in the way of what is due.
    Index(
        "ix_webhook_deliveries_open",
        "webhook_id",
        "due_at",
        sqlite_where=text("state IN ('pending', 'sending')"),
        postgresql_where=text("state IN ('pending', 'sending')"),
    ),
    sqlite_autoincrement=True,
)
