"""What JSON-RPC calls asked for and got, and prices of tools."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_AMOUNTS = (
    "input_nanousd_per_million",
    "cached_input_nanousd_per_million",
    "output_nanousd_per_million",
    "request_nanousd",
    "second_nanousd",
)


def upgrade() -> None:
    """Add the columns; make the table of prices anew, for no database changes a primary key as the other does."""
    for name in ("rpc_method", "rpc_name", "rpc_outcome"):
        op.add_column("receipts", sa.Column(name, sa.Text, nullable=False, server_default=""))
    names = ("model", "upstream", "valid_from_ns", *_AMOUNTS, "created_at")
    old = sa.table("prices", *(sa.column(name, UtcTime() if name == "created_at" else None) for name in names))
    rows = [dict(row._mapping) for row in op.get_bind().execute(sa.select(old))]
    op.drop_table("prices")
    new = op.create_table(
        "prices",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("upstream", sa.Text, nullable=False),
        sa.Column("valid_from_ns", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _AMOUNTS),
        sa.Column("created_at", UtcTime, nullable=False),
        sa.Column("tool", sa.Text, nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("model", "upstream", "valid_from_ns", "tool", name="pk_prices"),
    )
    if rows:
        op.bulk_insert(new, rows)
