"""What happened and who is to be told."""

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Table, Text

from gpuproxy.store.schema.base import Sequence, UtcTime, metadata

# Written in the transaction of what caused it; a consumer remembers the last `seq` it has seen.
events = Table(
    "events",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("user_id", Text, ForeignKey("users.id")),  # NULL: concerns everybody
    Column("data", JSON, nullable=False),
    Column("at", UtcTime, nullable=False, index=True),
    Index(None, "user_id", "seq"),
    sqlite_autoincrement=True,  # a number is never given twice, so a consumer never misses a row
)

# What was charged and is not told yet, of accounts of which somebody wants to hear it: only they have a row.
usage_sums = Table(
    "usage_sums",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("wanted_until", UtcTime, nullable=False),  # a webhook wants it beyond that
    Column("since", UtcTime),  # of the first charge in the sum; NULL: there is none
    Column("call_count", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_nanousd", BigInteger, nullable=False),
)
