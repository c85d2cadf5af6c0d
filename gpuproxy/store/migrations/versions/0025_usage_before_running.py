"""The view gpu_usage tells of rentals that were paid beforehand and given up before they ran, as they were charged."""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

DAY_NS = 86_400 * 10**9
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
    """Make the view anew."""
    op.execute("DROP VIEW gpu_usage")
    op.execute(_gpu_usage(**SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL))


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
    SELECT id, user_id, 'rental', provider, instance_id, gpu_model, key_id,
        COALESCE(running_at, created_at), ended_at, {hours.format("running_us")}, {usd.format(charged)}, {charged}
    FROM rentals WHERE running_at IS NOT NULL OR charged_nanousd > 0"""  # noqa: S608 - constants
