"""The parts of the receipts on PostgreSQL: one for each day (UTC) calls started on, so that an old day goes at once.

They are made some days ahead. What lies before the first, which is what was there when the table was parted, is in
``receipts_before``; what comes for a day without a part (nobody made it in time, a clock is wrong) in
``receipts_later``, and that day stays there. Making and dropping a part wait for nobody for long: see `LOCK_MS`.
"""

import re
from datetime import UTC, datetime

from sqlalchemy import Connection, text

from gpuproxy.ledger.settle import DAY_NS

DAYS_AHEAD = 3
LOCK_MS = 300  # whoever waits for a lock on the table keeps all that come after waiting; then it is tried again later
LOCK_ID = 7_305_819_213  # any number, but none of those for migrations and leading
PART = re.compile(r"receipts_\d{8}")

_PARTS = text(
    "SELECT relname, pg_get_expr(relpartbound, oid) AS bound FROM pg_class "
    "WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'receipts'::regclass)"
)


def part_of(day: int) -> str:
    """Return the name of the part for a day, counted from 1970."""
    return f"receipts_{datetime.fromtimestamp(day * 86_400, UTC):%Y%m%d}"


def make_days(connection: Connection, today: int) -> list[int]:
    """Make the parts that are missing from `today` to DAYS_AHEAD; return their days. Raises what PostgreSQL raises."""
    _be_quick(connection)
    bounds = {row.relname: row.bound for row in connection.execute(_PARTS)}
    first = max(today, _end_of(bounds["receipts_before"]))
    missing = [day for day in range(first, today + DAYS_AHEAD + 1) if part_of(day) not in bounds]
    return [day for day in missing if _make(connection, day)]


def old_days(connection: Connection, end: int) -> list[int]:
    """Return the days before `end` that have a part, oldest first."""
    found = (_end_of(row.bound) - 1 for row in connection.execute(_PARTS) if PART.fullmatch(row.relname))
    return sorted(day for day in found if day < end)


def drop_day(connection: Connection, day: int) -> None:
    """Drop a part, after `hold_day` in the same transaction."""
    connection.execute(text(f"ALTER TABLE receipts DETACH PARTITION {part_of(day)}"))
    connection.execute(text(f"DROP TABLE {part_of(day)}"))


def hold_day(connection: Connection, day: int) -> None:
    """Let nobody write to a part until the transaction ends."""
    _be_quick(connection)
    connection.execute(text(f"LOCK TABLE {part_of(day)} IN SHARE ROW EXCLUSIVE MODE"))


def _be_quick(connection: Connection) -> None:
    connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MS}"))
    connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_ID})"))  # two that lead for a moment


def _make(connection: Connection, day: int) -> bool:
    """Make one; not if receipts of the day lie in the rest, which would have to move."""
    start, end = day * DAY_NS, (day + 1) * DAY_NS
    is_begun = f"SELECT EXISTS (SELECT 1 FROM receipts_later WHERE started_ns >= {start} AND started_ns < {end})"  # noqa: S608
    if connection.scalar(text(is_begun)):
        return False
    connection.execute(text(f"CREATE TABLE {part_of(day)} (LIKE receipts INCLUDING DEFAULTS)"))
    # Attached when made: to make it as a part would lock out whoever reads the table.
    connection.execute(
        text(f"ALTER TABLE receipts ATTACH PARTITION {part_of(day)} FOR VALUES FROM ({start}) TO ({end})")
    )
    return True


def _end_of(bound: str) -> int:
    """Return the day at which a part ends."""
    return int(re.findall(r"\d+", bound)[-1]) // DAY_NS
