"""Routes that many call at the same moment, as a form sent twice or a program with many hands does."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from gpuproxy.control.once import HEADER
from gpuproxy.control.route import Route
from gpuproxy.control.table import TABLE
from gpuproxy.plugin import PaymentProvider, PaymentSettings

from .conftest import Api
from .test_routes import Bank, World

AT_ONCE = 6
CHANGES = [route for route in TABLE if route.takes and (route.is_once or route.rule == "admin")]


class Crowd(World):
    """Visitors that come together, each for themselves and all with one Idempotency-Key; tells of who fared worst."""

    async def _call(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
        found: list[tuple[int, Any]] = []
        for more in ({}, {HEADER: "one"}):
            calls = (self._api.call(method, path, body, headers | more) for _ in range(AT_ONCE))
            found += await asyncio.gather(*calls)
        return max(found, key=lambda each: each[0])


@pytest.fixture
async def providers() -> Mapping[str, PaymentProvider]:
    """Return who takes payments."""
    return {"bank": Bank(PaymentSettings())}


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)  # SQLite lets one write after the other
@pytest.mark.parametrize("route", CHANGES, ids=lambda route: f"{route.method} {route.path}")
async def test_of_many_at_once_none_meets_a_fault(api: Api, route: Route) -> None:
    _, status, told = await Crowd(api).visit(route, "admin" if route.rule == "admin" else "owner")
    assert status < 500, told
