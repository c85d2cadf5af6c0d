"""What is rented: one row for each rental, kept for ever; how providers are, and what is amiss with them."""

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
    UniqueConstraint,
)

from gpuproxy.store.schema.base import UtcTime, metadata

# One row: the prefix of every tag this store has given out, by which providers' lists are read.
installations = Table(
    "installations",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("prefix", Text, nullable=False),
    CheckConstraint("id = 1", name="there_is_one"),
)

# `id` is the contract and the tag the provider was given. Money in nanodollars; "rest" is a part of one nanodollar,
# in 3,600,000,000ths, so that no second is ever rounded twice. Rates are those in force since `metered_at`.
rentals = Table(
    "rentals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("key_id", Text, nullable=False, server_default=""),  # whose budgets bound it; empty: no key's
    Column("provider", Text, nullable=False),
    Column("offer_id", Text, nullable=False),
    Column("native_id", Text, nullable=False),  # the provider's; empty until it is known
    Column("instance_id", Text, nullable=False),  # the same with the provider's prefix, as people know it
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),  # why it stopped, ended or failed
    Column("has_failed", Boolean, nullable=False),  # it ends as failed
    Column("label", Text, nullable=False),
    Column("gpu_model", Text, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("region", Text, nullable=False),
    Column("spec", JSON, nullable=False),  # what was asked for, without anything that may be a secret
    Column("ip", Text, nullable=False),
    Column("ports", JSON, nullable=False),  # {"8000": 40800}: inside to outside
    Column("basis", Text, nullable=False),
    Column("price_nanousd_per_hour", BigInteger, nullable=False),
    Column("storage_price_nanousd_per_hour", BigInteger, nullable=False),
    Column("cost_nanousd_per_hour", BigInteger, nullable=False),
    Column("storage_cost_nanousd_per_hour", BigInteger, nullable=False),
    Column("committed_hours", Integer, nullable=False),  # paid beforehand; 0 for what is billed as it runs
    Column("rate_nanousd_per_hour", BigInteger, nullable=False),
    Column("cost_rate_nanousd_per_hour", BigInteger, nullable=False),
    Column("metered_at", UtcTime, nullable=False),
    Column("running_us", BigInteger, nullable=False),
    Column("stopped_us", BigInteger, nullable=False),
    Column("accrued_nanousd", BigInteger, nullable=False),
    Column("accrued_rest", BigInteger, nullable=False),
    Column("cost_accrued_nanousd", BigInteger, nullable=False),
    Column("cost_accrued_rest", BigInteger, nullable=False),
    Column("charged_nanousd", BigInteger, nullable=False),
    Column("written_off_nanousd", BigInteger, nullable=False),
    Column("cost_posted_nanousd", BigInteger, nullable=False),
    Column("hold_id", Text, ForeignKey("holds.id"), nullable=False),
    Column("warned_s", Integer, nullable=False),  # the last warning of low balance: how many seconds were left; 0: none
    Column("request_key", Text, unique=True),  # of the Idempotency-Key that asked for it
    Column("request_hash", Text, nullable=False),
    Column("group_id", Text, nullable=False),  # of a reservation: all of them or none
    Column("seen_at", UtcTime),  # when the provider, asked for it alone, last said that it is there
    Column("missing_count", Integer, nullable=False),  # complete lists without it, one after another
    Column("created_at", UtcTime, nullable=False),
    Column("running_at", UtcTime),
    Column("moved_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Column("expires_at", UtcTime),
    Index(None, "user_id", "created_at"),
    Index(None, "state"),
    Index(None, "provider", "native_id"),
    Index(None, "group_id"),
)

# One row for each provider: how the last look at its list, and at its charges, went.
provider_looks = Table(
    "provider_looks",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("looked_at", UtcTime),
    Column("listed_at", UtcTime),  # the last look that brought a list
    Column("error", Text, nullable=False),  # of the last look; empty: it went well
    Column("instance_count", Integer, nullable=False),  # in the last list
    Column("compared_until", UtcTime),  # rentals that ended before that are compared with what the provider took
    Column("compare_error", Text, nullable=False),
    Column("comparison", JSON),  # the last one
)

# What a person should look at: instances we did not rent, and rentals that cost us other than counted.
fleet_findings = Table(
    "fleet_findings",
    metadata,
    Column("id", Text, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("kind", Text, nullable=False),  # stray, foreign, difference
    Column("subject_id", Text, nullable=False),  # the provider's id of the instance, or the rental's
    Column("detail", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("resolved_at", UtcTime),  # it is there no more
    Column("acknowledged_at", UtcTime),
    UniqueConstraint("provider", "kind", "subject_id"),
    Index(None, "created_at"),
)
