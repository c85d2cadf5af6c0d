"""What happened and who is to be told."""

from sqlalchemy import JSON, Column, ForeignKey, Index, Table, Text

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
