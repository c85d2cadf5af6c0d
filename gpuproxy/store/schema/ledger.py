"""What calls used and what is owed: receipts, accounts, transfers, holds, prices."""

from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    false,
)
from sqlalchemy.types import TypeEngine

from gpuproxy.store.schema.base import UtcTime, metadata
from gpuproxy.types import NOT_STORED, Receipt

RECEIPT_SUMS = (
    "requests",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "request_bytes",
    "response_bytes",
    "duration_us",
    "cost_nanousd",
)


def _receipt_columns() -> list[Column[Any]]:
    kinds: dict[Any, TypeEngine[Any]] = {int: BigInteger(), bool: Boolean()}
    return [
        Column(field.name, kinds.get(field.type, Text()), nullable=False)
        for field in msgspec.structs.fields(Receipt)
        if field.name not in NOT_STORED
    ]


# A receipt is known by its id; its start stands before that in the key, so that what is new is written side by side,
# what is old is found without an index of its own, and PostgreSQL can part the table by the day. See ledger.days.
receipts = Table(
    "receipts",
    metadata,
    *_receipt_columns(),
    Column("cost_nanousd", BigInteger, nullable=False, server_default="0"),
    Column("charge_id", Text, nullable=False, server_default=""),  # named by the transfers that pay it
    PrimaryKeyConstraint("started_ns", "id"),
    Index(None, "user_id", "started_ns"),
    sqlite_with_rowid=False,
)

# What receipts that have gone add up to, by the day (UTC, from 1970) their calls started.
receipt_days = Table(
    "receipt_days",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("day", BigInteger, primary_key=True),
    Column("key_id", Text, primary_key=True),
    Column("upstream", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("tool", Text, primary_key=True),
    Column("is_refused", Boolean, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in RECEIPT_SUMS),
)

# How far each journal segment has been read; moves in the transaction that stores its receipts.
journal_segments = Table(
    "journal_segments",
    metadata,
    Column("name", Text, primary_key=True),
    Column("offset", BigInteger, nullable=False),
)

# The last checkpoints of calls that are not over: a Receipt in MessagePack; goes when the receipt itself comes.
open_calls = Table(
    "open_calls",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False, index=True),  # the worker, as owner of its leases
    Column("receipt", LargeBinary, nullable=False),
)

accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner_user_id", Text, ForeignKey("users.id"), index=True),
    Column("kind", Text, nullable=False),
    Column("posted_nanousd", BigInteger, nullable=False),
    Column("held_nanousd", BigInteger, nullable=False),
    Column("overdraft_nanousd", BigInteger, nullable=False, server_default="0"),
    Column("low_nanousd", BigInteger),  # below so much the customer is told; NULL: the configuration's; 0: never
    Column("is_low_told", Boolean, nullable=False, server_default=false()),  # until credit is added
    CheckConstraint("held_nanousd >= 0", name="held_is_not_negative"),
    CheckConstraint(
        "kind <> 'credit' OR posted_nanousd - held_nanousd >= -overdraft_nanousd", name="credit_is_not_overspent"
    ),
)

# Immutable: triggers made by the migration refuse UPDATE and DELETE.
transfers = Table(
    "transfers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("debit_account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("credit_account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False, unique=True),
    Column("created_at", UtcTime, nullable=False),
    Column("charge_id", Text, nullable=False, server_default=""),  # names the receipts it pays
    CheckConstraint("amount_nanousd > 0", name="amount_is_positive"),
    CheckConstraint("debit_account_id <> credit_account_id", name="accounts_differ"),
    Index(None, "debit_account_id", "created_at", "id"),
    Index(None, "credit_account_id", "created_at", "id"),
)

# Credit set aside: of ``amount`` in all, ``posted`` was charged, ``remaining`` is still held, the rest went back.
holds = Table(
    "holds",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("remaining_nanousd", BigInteger, nullable=False),
    Column("posted_nanousd", BigInteger, nullable=False),
    Column("idempotency_key", Text, nullable=False, unique=True),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("resolved_at", UtcTime),
    CheckConstraint(
        "remaining_nanousd >= 0 AND posted_nanousd >= 0 AND posted_nanousd + remaining_nanousd <= amount_nanousd",
        name="parts_fit",
    ),
    CheckConstraint("state = 'pending' OR remaining_nanousd = 0", name="nothing_remains"),
    Index(None, "state", "expires_at"),
    Index(None, "state", "owner"),
)

# Prices set while running; those of the configuration stand behind them.
prices = Table(
    "prices",
    metadata,
    Column("model", Text, primary_key=True),
    Column("upstream", Text, primary_key=True),
    Column("valid_from_ns", BigInteger, primary_key=True),
    Column("input_nanousd_per_million", BigInteger, nullable=False),
    Column("cached_input_nanousd_per_million", BigInteger, nullable=False),
    Column("output_nanousd_per_million", BigInteger, nullable=False),
    Column("request_nanousd", BigInteger, nullable=False),
    Column("second_nanousd", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("tool", Text, primary_key=True, server_default=""),
)
