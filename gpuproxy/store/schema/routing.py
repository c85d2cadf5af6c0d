"""Upstreams and models that were set while running."""

from sqlalchemy import JSON, Column, Table, Text

from gpuproxy.store.schema.base import UtcTime, metadata

# `kind` is "upstreams" or "models"; `block` is what a block of the configuration of that kind would say.
routing_blocks = Table(
    "routing_blocks",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("block", JSON, nullable=False),
    Column("changed_at", UtcTime, nullable=False),
)
