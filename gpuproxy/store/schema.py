"""The tables, in SQLAlchemy Core, portable between SQLite and PostgreSQL.

Money is integers of nanodollars in BIGINT columns. Times of accounts are UTC timestamps; times of receipts
are unix nanoseconds, as workers write them. The migrations create these tables; a test compares the two.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from gpuproxy.types import Receipt

NAMES = {  # every constraint has a name, or a later migration could not address it
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = MetaData(naming_convention=NAMES)


class UtcTime(TypeDecorator[datetime]):
    """A point in time, always aware and in UTC; SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn to UTC; raises ValueError for a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the time {value} has no zone; give an aware datetime")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


# SQLite counts up only a column declared exactly INTEGER PRIMARY KEY.
Sequence = BigInteger().with_variant(Integer(), "sqlite")

users = Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    Column("email", Text, nullable=False, unique=True),
    Column("is_admin", Boolean, nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("models", JSON(none_as_null=True)),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Column("rpm", Integer),  # requests per minute; 0: no limit; NULL: the default
    # Control asks for what has just expired several times a second; what is revoked must not be in its way.
    Index(None, "expires_at", sqlite_where=text("revoked_at IS NULL"), postgresql_where=text("revoked_at IS NULL")),
)

# Apart from users, which other programs read. Who has no row here cannot log in.
passwords = Table(
    "passwords",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("hash", Text, nullable=False),
    Column("changed_at", UtcTime, nullable=False),
)

# One log-in and all tokens that came from it.
sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False, index=True),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
    Column("revoked_at", UtcTime),
)

# Used ones stay until they expire, so that a second use is seen.
refresh_tokens = Table(
    "refresh_tokens",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("session_id", Text, ForeignKey("sessions.id"), nullable=False, index=True),
    Column("expires_at", UtcTime, nullable=False, index=True),
    Column("used_at", UtcTime),
)

# Answers to calls that carried an Idempotency-Key; status and body are NULL while the call runs.
idempotency = Table(
    "idempotency",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_hash", LargeBinary(32), nullable=False),
    Column("status", Integer),
    Column("body", LargeBinary),
    Column("created_at", UtcTime, nullable=False, index=True),
)

# What admins did, written in the transaction that did it.
audit = Table(
    "audit",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("at", UtcTime, nullable=False),
    Column("actor_user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("actor_key_id", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject_id", Text, nullable=False, index=True),
    Column("detail", JSON, nullable=False),
    sqlite_autoincrement=True,
)

# What workers must hear of, written in the same transaction as the change itself.
changes = Table(
    "changes",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("at", UtcTime, nullable=False, index=True),
    sqlite_autoincrement=True,  # a number is never given twice, so a reader never misses a row
)


def _receipt_columns() -> list[Column[Any]]:
    kinds: dict[Any, TypeEngine[Any]] = {int: BigInteger(), bool: Boolean()}
    return [
        Column(field.name, kinds.get(field.type, Text()), nullable=False, primary_key=field.name == "id")
        for field in msgspec.structs.fields(Receipt)
    ]


receipts = Table(
    "receipts",
    metadata,
    *_receipt_columns(),
    Column("cost_nanousd", BigInteger, nullable=False, server_default="0"),
    Column("charge_id", Text, nullable=False, server_default=""),  # named by the transfers that pay it
    Index(None, "user_id", "started_ns"),
)

# How far each journal segment has been read; moves in the transaction that stores its receipts.
journal_segments = Table(
    "journal_segments",
    metadata,
    Column("name", Text, primary_key=True),
    Column("offset", BigInteger, nullable=False),
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
    Column("debit_account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("credit_account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False, unique=True),
    Column("created_at", UtcTime, nullable=False),
    Column("charge_id", Text, nullable=False, server_default=""),  # names the receipts it pays
    CheckConstraint("amount_nanousd > 0", name="amount_is_positive"),
    CheckConstraint("debit_account_id <> credit_account_id", name="accounts_differ"),
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
)
