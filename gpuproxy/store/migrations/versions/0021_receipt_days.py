"""Receipts ordered by the start of their call, on PostgreSQL parted by its day; sums of those that have gone.

No database changes a primary key as the other does. SQLite copies the rows into a new table. On PostgreSQL what is
there becomes the first part as it stands, up to the end of this day; days behind that are made while running.
"""

from time import time_ns

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

DAY_NS = 86_400 * 10**9
SUMS = (
    "requests",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "request_bytes",
    "response_bytes",
    "duration_us",
    "cost_nanousd",
)
POSTGRESQL = {
    "time": "TIMESTAMPTZ 'epoch' + ({0}) / 1000 * INTERVAL '1 microsecond'",
    "hours": "({0}) / 3600000000.0::double precision",
    "usd": "({0}) * 0.000000001",
}
SQLITE = {
    "time": "strftime('%Y-%m-%d %H:%M:%S', ({0}) / 1000000000, 'unixepoch') || printf('.%06d', ({0}) / 1000 % 1000000)",
    "hours": "({0}) / 3600000000.0",
    "usd": "({0}) / 1000000000.0",
}


def upgrade() -> None:
    """Make the table anew, the table of sums, and the view over both."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    op.execute("DROP VIEW gpu_usage")
    (_order_sqlite if is_sqlite else _part_postgresql)()
    op.create_table(
        "receipt_days",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("day", sa.BigInteger, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("upstream", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("tool", sa.Text, nullable=False),
        sa.Column("is_refused", sa.Boolean, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in SUMS),
        sa.PrimaryKeyConstraint(
            "user_id", "day", "key_id", "upstream", "model", "tool", "is_refused", name="pk_receipt_days"
        ),
    )
    op.execute(_gpu_usage(**SQLITE if is_sqlite else POSTGRESQL))


def _order_sqlite() -> None:
    columns = op.get_bind().exec_driver_sql("PRAGMA table_info(receipts)").all()
    written = (f'"{name}" {kind} NOT NULL' + _default(default) for _, name, kind, _, default, _ in columns)
    op.execute(
        f"CREATE TABLE ordered ({', '.join(written)}, CONSTRAINT pk_receipts PRIMARY KEY (started_ns, id)) "
        "WITHOUT ROWID"
    )
    op.execute("INSERT INTO ordered SELECT * FROM receipts ORDER BY started_ns, id")
    op.execute("DROP TABLE receipts")
    op.execute("ALTER TABLE ordered RENAME TO receipts")
    op.execute("CREATE INDEX ix_receipts_user_id_started_ns ON receipts (user_id, started_ns)")


def _default(text: str | None) -> str:
    return "" if text is None else f" DEFAULT {text}"


def _part_postgresql() -> None:
    newest_ns = op.get_bind().scalar(sa.text("SELECT max(started_ns) FROM receipts")) or 0
    end_ns = (max(newest_ns, time_ns()) // DAY_NS + 1) * DAY_NS
    for statement in (
        "ALTER TABLE receipts RENAME TO receipts_before",
        "ALTER TABLE receipts_before DROP CONSTRAINT pk_receipts",
        "ALTER TABLE receipts_before ADD CONSTRAINT pk_receipts_before PRIMARY KEY (started_ns, id)",
        "ALTER INDEX ix_receipts_user_id_started_ns RENAME TO ix_receipts_before_user_id_started_ns",
        "CREATE TABLE receipts (LIKE receipts_before INCLUDING DEFAULTS) PARTITION BY RANGE (started_ns)",
        "ALTER TABLE receipts ADD CONSTRAINT pk_receipts PRIMARY KEY (started_ns, id)",
        "CREATE INDEX ix_receipts_user_id_started_ns ON receipts (user_id, started_ns)",
        f"ALTER TABLE receipts ATTACH PARTITION receipts_before FOR VALUES FROM (MINVALUE) TO ({end_ns})",
        "CREATE TABLE receipts_later PARTITION OF receipts DEFAULT",
    ):
        op.execute(statement)


def _gpu_usage(time: str, hours: str, usd: str) -> str:
    started, ended = time.format("started_ns"), time.format("started_ns + duration_us * 1000")
    begun, over = time.format(f"day * {DAY_NS}"), time.format(f"(day + 1) * {DAY_NS}")
    name = "CAST(day AS TEXT) || '/' || key_id || '/' || upstream || '/' || model || '/' || tool"
    charged = "charged_nanousd + written_off_nanousd"
    return f"""CREATE VIEW gpu_usage AS
    SELECT id, user_id, 'inference' AS kind, upstream AS provider, '' AS instance_id, model, key_id,
        {started} AS start_time, {ended} AS end_time, {hours.format("duration_us")} AS duration,
        {usd.format("cost_nanousd")} AS cost, cost_nanousd
    FROM receipts WHERE user_id <> '' AND outcome <> 'refused'
    UNION ALL
    SELECT {name}, user_id, 'inference', upstream, '', model, key_id,
        {begun}, {over}, {hours.format("duration_us")}, {usd.format("cost_nanousd")}, cost_nanousd
    FROM receipt_days WHERE user_id <> '' AND NOT is_refused
    UNION ALL
    SELECT id, user_id, 'rental', provider, instance_id, gpu_model, '',
        running_at, ended_at, {hours.format("running_us")}, {usd.format(charged)}, {charged}
    FROM rentals WHERE running_at IS NOT NULL"""  # noqa: S608 - constants
