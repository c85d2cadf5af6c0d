"""Who is there: users, their keys and log-ins, what admins did, what workers must hear of."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)

from gpuproxy.store.schema.base import Sequence, UtcTime, metadata

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
    Column("rpm_ceiling", Integer),  # how far a call may raise it; NULL: not at all
    Column("tpm", BigInteger),  # tokens per minute; 0: no limit; NULL: the default
    Column("streams", Integer),  # open at once; 0: no limit; NULL: the default
    Column("tools", JSON(none_as_null=True)),  # rules; NULL: every tool
    Column("root_id", Text),  # the key whose budgets it shares: it came from that by rotation; NULL: itself
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

# What opens /ws once instead of a credential, which one of key_id and session_id names.
tickets = Table(
    "tickets",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("key_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
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
