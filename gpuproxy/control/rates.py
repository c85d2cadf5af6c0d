"""Requests per minute to the management API, of each user or key with a limit of its own, counted apart from calls."""

import math
import time

from aiohttp import web
from msgspec import Struct

from gpuproxy.access.callers import Caller
from gpuproxy.config import Rates
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.rates import Window

NS_PER_S = 1_000_000_000
SUBJECTS_MAX = 10_000  # remembered before those that count no more are forgotten
OVERRIDE_MAX = 1 << 31
WAIT_S_MAX = 60  # many clients heed no longer wait; who is early is asked for the last second


class Count(Struct, frozen=True):
    """How a caller stands, for the X-RateLimit fields."""

    limit: int
    remaining: int
    reset_s: int


COUNT = web.RequestKey("count", Count)


class ApiRates:
    """Who has asked how often in the last minute."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._windows: dict[str, Window] = {}
        self._number = 0

    def count(self, caller: Caller, wish: int, now_ns: int) -> tuple[bool, Count] | None:
        """Count one request and tell whether it may pass; None for a caller without a limit.

        `wish` raises the limit as far as the key's ceiling.
        """
        own = caller.rpm
        limit = self._rates.requests_per_minute if own is None else own
        if not limit:
            return None
        limit = max(limit, min(wish, caller.rpm_ceiling or 0))
        window = self._window(caller.user_id if own is None else caller.key_id, now_ns)
        self._number += 1
        passes = bool(window.grant(("", self._number), limit, 1, 1, now_ns).amount)
        reset_s = math.ceil(max(0, window.reset_ns(now_ns) - now_ns) / NS_PER_S)
        return passes, Count(limit, window.left(limit, now_ns), reset_s)

    def _window(self, subject: str, now_ns: int) -> Window:
        if len(self._windows) >= SUBJECTS_MAX and subject not in self._windows:
            for window in self._windows.values():
                window.left(0, now_ns)
            self._windows = {name: window for name, window in self._windows.items() if not window.is_empty}
        return self._windows.setdefault(subject, Window())


RATES = web.AppKey("rates", ApiRates)


def count_request(request: web.Request, caller: Caller) -> None:
    """Count a request. Raises GatewayError RATE_LIMITED, BAD_REQUEST for an override that is no number."""
    counted = request.app[RATES].count(caller, _wish(request, caller), time.monotonic_ns())
    if counted is None:
        return
    passes, request[COUNT] = counted
    if not passes:
        count = counted[1]
        wait_s = min(max(1, count.reset_s), WAIT_S_MAX)
        raise GatewayError("RATE_LIMITED", f"over {count.limit} requests a minute; wait {wait_s} s", wait_s)


async def tell_count(request: web.Request, response: web.StreamResponse) -> None:
    """Put the X-RateLimit fields on an answer."""
    count = request.get(COUNT)
    if count is not None:
        response.headers["X-RateLimit-Limit"] = str(count.limit)
        response.headers["X-RateLimit-Remaining"] = str(count.remaining)
        response.headers["X-RateLimit-Reset"] = str(count.reset_s)


def _wish(request: web.Request, caller: Caller) -> int:
    given = request.headers.getall("X-Rate-Limit-Override", ())
    if not given or not caller.rpm_ceiling:
        return 0
    text = given[0]
    if len(given) > 1 or not (text.isascii() and text.isdigit() and len(text) <= 10 and 0 < int(text) <= OVERRIDE_MAX):
        raise GatewayError("BAD_REQUEST", "X-Rate-Limit-Override must be one whole number from 1 to 2147483648")
    return int(text)
