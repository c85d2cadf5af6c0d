"""What other programs read with SQL: gpu_usage, billing_transactions, credits; transfers in order of each account.

The views have the same columns on both databases. Hours and dollars are numbers: exact dollars on PostgreSQL (NUMERIC),
REAL on SQLite, which has no decimals; ``…_nanousd`` is exact on both. A rental that still runs has no end_time.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

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
    """Create the views; exchange the indexes of transfers."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    written = SQLITE if is_sqlite else POSTGRESQL
    for view in (_gpu_usage, _billing_transactions, _credits):
        op.execute(view(**written))
    for side in ("debit", "credit"):
        account = f"{side}_account_id"
        op.create_index(f"ix_transfers_{account}_created_at_id", "transfers", [account, "created_at", "id"])
        op.drop_index(f"ix_transfers_{account}", "transfers")


def _gpu_usage(time: str, hours: str, usd: str) -> str:
    started, ended = time.format("started_ns"), time.format("started_ns + duration_us * 1000")
    charged = "charged_nanousd + written_off_nanousd"
    return f"""CREATE VIEW gpu_usage AS
    SELECT id, user_id, 'inference' AS kind, upstream AS provider, '' AS instance_id, model, key_id,
        {started} AS start_time, {ended} AS end_time, {hours.format("duration_us")} AS duration,
        {usd.format("cost_nanousd")} AS cost, cost_nanousd
    FROM receipts WHERE user_id <> '' AND outcome <> 'refused'
    UNION ALL
    SELECT id, user_id, 'rental', provider, instance_id, gpu_model, '',
        running_at, ended_at, {hours.format("running_us")}, {usd.format(charged)}, {charged}
    FROM rentals WHERE running_at IS NOT NULL"""  # noqa: S608 - constants


def _billing_transactions(time: str, hours: str, usd: str) -> str:
    def side(account: str, amount: str) -> str:
        return f"""SELECT t.id, a.owner_user_id AS user_id, t.kind, {usd.format(amount)} AS amount, 'USD' AS currency,
            'completed' AS status, t.charge_id, t.created_at, {amount} AS amount_nanousd
        FROM transfers t JOIN accounts a ON a.id = t.{account}_account_id WHERE a.kind = 'credit'"""  # noqa: S608

    sides = side("credit", "t.amount_nanousd"), side("debit", "-t.amount_nanousd")
    return f"CREATE VIEW billing_transactions AS {' UNION ALL '.join(sides)}"


def _credits(time: str, hours: str, usd: str) -> str:
    names = ("credits_remaining", "credits_total", "held", "cap")
    shown = ", ".join(f"{usd.format(f'{name}_nanousd')} AS {name}" for name in names)
    return f"""CREATE VIEW credits AS
    SELECT user_id, {shown}, {", ".join(f"{name}_nanousd" for name in names)} FROM (
        SELECT u.id AS user_id,
            COALESCE(a.posted_nanousd - a.held_nanousd, 0) AS credits_remaining_nanousd,
            CAST((
                SELECT COALESCE(SUM(t.amount_nanousd), 0) FROM transfers t WHERE t.credit_account_id = a.id
            ) AS BIGINT) AS credits_total_nanousd,
            COALESCE(a.held_nanousd, 0) AS held_nanousd,
            COALESCE(a.overdraft_nanousd, 0) AS cap_nanousd
        FROM users u LEFT JOIN accounts a ON a.id = 'credit:' || u.id
    ) AS every_user"""  # noqa: S608 - constants
