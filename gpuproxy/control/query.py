"""Parameters in a query, each read strictly and named when it is wrong."""

import re
from datetime import UTC, datetime

from aiohttp import web

from gpuproxy.access.paging import ROWS_DEFAULT, ROWS_MAX, Page
from gpuproxy.errors import GatewayError

# What ids look like, of rows that are there and of those that have gone: numbers of deliveries, and long random ones.
_is_id = re.compile(r"[0-9]{1,18}|[0-9A-Za-z_-]{16,64}").fullmatch
PAGE = {
    "limit": f"how many, 1 to {ROWS_MAX}; {ROWS_DEFAULT} if left out",
    "cursor": "the next_cursor of the page before",
}


def time_asked(request: web.Request, name: str) -> datetime | None:
    """Return an ISO 8601 time, in UTC unless it says otherwise; None if it is left out."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        message = f"{name}={text[:40]!r} is not an ISO 8601 time; write 2024-01-12T10:30:00Z"
        raise GatewayError("UNPROCESSABLE", message, param=name) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def count_asked(request: web.Request, name: str, default: int, highest: int) -> int:
    """Return a whole number from 1 to `highest`."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= highest):
        raise GatewayError("UNPROCESSABLE", f"{name}={text[:20]!r} is out of range; 1 to {highest}", param=name)
    return int(text)


def page_asked(request: web.Request) -> Page:
    """Return which page of a list is asked for by ``limit`` and ``cursor``."""
    cursor = request.query.get("cursor", "")
    if cursor and not _is_id(cursor):
        raise GatewayError("UNPROCESSABLE", f"cursor={cursor[:40]!r} is no next_cursor", param="cursor")
    return Page(count_asked(request, "limit", ROWS_DEFAULT, ROWS_MAX), cursor)
