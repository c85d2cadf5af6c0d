"""The tables, in SQLAlchemy Core, portable between SQLite and PostgreSQL; one module for each part that owns them.

Money is integers of nanodollars in BIGINT columns. Times of accounts are UTC timestamps; times of receipts
are unix nanoseconds, as workers write them. The migrations create these tables; a test compares the two.
"""

from gpuproxy.store.schema.accounts import (
    api_keys,
    audit,
    changes,
    idempotency,
    passwords,
    refresh_tokens,
    sessions,
    tickets,
    users,
)
from gpuproxy.store.schema.base import NAMES, Sequence, UtcTime, metadata
from gpuproxy.store.schema.billing import (
    auto_renewals,
    payment_events,
    payment_methods,
    payment_reversals,
    payments,
)
from gpuproxy.store.schema.events import events, usage_sums
from gpuproxy.store.schema.fleet import fleet_findings, installations, provider_looks, rentals
from gpuproxy.store.schema.ledger import (
    RECEIPT_SUMS,
    accounts,
    holds,
    journal_segments,
    open_calls,
    prices,
    receipt_days,
    receipts,
    transfers,
)
from gpuproxy.store.schema.routing import routing_blocks
from gpuproxy.store.schema.terms import account_terms, budgets
from gpuproxy.store.schema.webhooks import deliveries, webhook_events, webhooks

__all__ = [
    "NAMES",
    "RECEIPT_SUMS",
    "Sequence",
    "UtcTime",
    "account_terms",
    "accounts",
    "api_keys",
    "audit",
    "auto_renewals",
    "budgets",
    "changes",
    "deliveries",
    "events",
    "fleet_findings",
    "holds",
    "idempotency",
    "installations",
    "journal_segments",
    "metadata",
    "open_calls",
    "passwords",
    "payment_events",
    "payment_methods",
    "payment_reversals",
    "payments",
    "prices",
    "provider_looks",
    "receipt_days",
    "receipts",
    "refresh_tokens",
    "rentals",
    "routing_blocks",
    "sessions",
    "tickets",
    "transfers",
    "usage_sums",
    "users",
    "webhook_events",
    "webhooks",
]
