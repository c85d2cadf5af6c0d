"""What calls cost, as admins see and set it: ``/api/v1/admin/prices``."""

import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct
from msgspec.structs import replace
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy import config
from gpuproxy.access.audit import note
from gpuproxy.config import checks
from gpuproxy.control.once import once
from gpuproxy.control.parts import CALLER, CONFIG, STORE
from gpuproxy.control.query import count_asked
from gpuproxy.control.respond import answer
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.catalogue import NOTICE_S, PRICES_MAX, cursor_of, insert_price, load_catalogue, page_of_prices
from gpuproxy.ledger.usage import unix_ns
from gpuproxy.pricing import Price, from_config

PRICES_DEFAULT = 100
QUERY = {
    "limit": f"how many versions, 1 to {PRICES_MAX}; {PRICES_DEFAULT} if left out",
    "cursor": "the next_cursor of the page before",
    "model": "of this model only; * is the price of every model",
}
CHECKS = {  # the rest are dollars
    "model": checks.optional_text,
    "tool": checks.optional_text,
    "upstream": checks.optional_upstream_name,
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Name = Annotated[str, Meta(max_length=256)]
UsdText = Annotated[str, Meta(max_length=20, examples=["0.15"], description="US dollars as text; empty: nothing")]


class NewPrice(Struct, forbid_unknown_fields=True):
    """A price to hold from `valid_from` on, as a block ``[[prices]]`` of the configuration says it."""

    model: Annotated[Name, Meta(description="* is every model")] = ""
    upstream: Annotated[str, Meta(max_length=64, description="empty: every upstream")] = ""
    input_usd_per_million: UsdText = ""
    cached_input_usd_per_million: UsdText = ""
    output_usd_per_million: UsdText = ""
    per_request_usd: UsdText = ""
    per_second_usd: UsdText = ""
    tool: Annotated[Name, Meta(description="instead of a model; * is every tool")] = ""
    valid_from: Annotated[datetime | None, Meta(description="not in the past; left out: in a moment")] = None


class PriceInfo(Struct):
    """A version of a price. Those of the configuration have no `valid_from`, and stand behind the others."""

    model: str
    upstream: str
    input_usd_per_million: str
    cached_input_usd_per_million: str
    output_usd_per_million: str
    per_request_usd: str
    per_second_usd: str
    valid_from: datetime | None
    is_in_force: bool
    tool: str


async def history(request: web.Request) -> web.Response:
    """List all versions of prices by model, upstream and time; the configured ones first."""
    store, model = request.app[STORE], request.query.get("model")
    configured = request.app[CONFIG].prices
    limit = count_asked(request, "limit", PRICES_DEFAULT, PRICES_MAX)
    cursor = request.query.get("cursor", "")
    catalogue, now_ns = await load_catalogue(store, configured), time.time_ns()
    versions = await page_of_prices(store, limit, cursor, model)
    first = [from_config(each) for each in configured if model in (None, each.model)] if not cursor else []
    shown = [_shown(price, catalogue.holds(price, now_ns)) for price in (*first, *versions)]
    fields = {"data": shown, "count": len(shown), "status": "success"}
    return answer(fields | ({"next_cursor": cursor_of(versions[-1])} if len(versions) == limit else {}))


async def set_price(request: web.Request, body: NewPrice) -> web.Response:
    """Set a price from a time on; what was set before stays readable."""
    price = _price(body)
    caller = request[CALLER]

    async def work(connection: AsyncConnection) -> PriceInfo:
        await insert_price(request.app[STORE], connection, price)
        await note(connection, caller, "price.set", price.model or price.tool, {"upstream": price.upstream})
        return _shown(price, is_in_force=False)

    return await once(request, body, 201, work)


def _price(body: NewPrice) -> Price:
    texts = {name: getattr(body, name) for name in config.Price.__struct_fields__}
    for name, text in texts.items():
        if complaint := CHECKS.get(name, checks.usd)(text):
            raise GatewayError("UNPROCESSABLE", f"{name}: {complaint}", param=name)
    if complaint := checks.priced(body.model, body.tool, texts):
        raise GatewayError("UNPROCESSABLE", complaint, param="tool" if body.tool else "model")
    return replace(from_config(config.Price(**texts)), valid_from_ns=unix_ns(_valid_from(body.valid_from)))


def _valid_from(wished: datetime | None) -> datetime:
    now = datetime.now(UTC)
    wished = wished if wished is None or wished.tzinfo else wished.replace(tzinfo=UTC)
    if wished is not None and wished < now:
        message = f"valid_from: {wished.isoformat()} lies in the past; what is done is not priced anew"
        raise GatewayError("UNPROCESSABLE", message, param="valid_from")
    earliest = now + timedelta(seconds=NOTICE_S)
    return earliest if wished is None else max(wished, earliest)


def _shown(price: Price, is_in_force: bool) -> PriceInfo:
    return PriceInfo(
        price.model,
        price.upstream,
        format_usd(price.input_nanousd_per_million),
        format_usd(price.cached_input_nanousd_per_million),
        format_usd(price.output_nanousd_per_million),
        format_usd(price.request_nanousd),
        format_usd(price.second_nanousd),
        EPOCH + timedelta(microseconds=price.valid_from_ns // 1_000) if price.valid_from_ns else None,
        is_in_force,
        price.tool,
    )
