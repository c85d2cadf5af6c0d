"""What holds for one account or key beside its credit: a markup on prices, budgets."""

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Integer, Table, Text, UniqueConstraint

from gpuproxy.store.schema.base import UtcTime, metadata

# Who has no row pays the prices as they are.
account_terms = Table(
    "account_terms",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("markup_bps", Integer, nullable=False),
    Column("changed_at", UtcTime, nullable=False),
)

# Windows of a length follow one another from 1970-01-01 UTC. `spent` and `told` (percent) are of the window with the
# number `window_number`; in a later one they are nothing.
budgets = Table(
    "budgets",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("key_id", Text, nullable=False),  # the root of the keys that share it; empty: all of the user
    Column("window_s", Integer, nullable=False),
    Column("limit_nanousd", BigInteger, nullable=False),
    Column("is_admins", Boolean, nullable=False),  # set by an admin; the user cannot change it
    Column("window_number", BigInteger, nullable=False),
    Column("spent_nanousd", BigInteger, nullable=False),
    Column("told_percent", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    CheckConstraint("limit_nanousd > 0", name="limit_is_positive"),
    UniqueConstraint("user_id", "key_id", "window_s", "is_admins"),
)
