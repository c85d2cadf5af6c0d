"""Retry-After: seconds or a date (RFC 9110 §10.2.3)."""

import math
from datetime import UTC
from email.utils import parsedate_to_datetime


def seconds_asked(text: str, now_s: float) -> int | None:
    """Return for how many seconds an answer asks to wait, 0 for a date that is over; None if it does not say.

    `now_s` is the time since 1970 that a date is compared with.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return int(text[:10])
    until_s = unix_time(text)
    return None if until_s is None else max(0, math.ceil(until_s - now_s))


def unix_time(date: str) -> float | None:
    """Return an HTTP date in seconds since 1970, None if it is none."""
    try:
        when = parsedate_to_datetime(date)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
