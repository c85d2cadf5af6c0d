"""Upstreams and models as admins see and change them while running: ``/api/v1/admin/upstreams``, ``…/models``.

A block says what one in the configuration would. One set here replaces one of the file of that name; deleting it lets
the file's hold again. What does not fit is refused with every fault, and nothing changes.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct
from sqlalchemy import delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.audit import note
from gpuproxy.config import Model, Upstream
from gpuproxy.control.parts import BUS, CALLER, ROUTING, STORE
from gpuproxy.control.respond import listing, success
from gpuproxy.control.routing import TOPIC, blocks_set, written
from gpuproxy.errors import GatewayError
from gpuproxy.link.messages import EndpointState
from gpuproxy.store.engine import insert_into
from gpuproxy.store.schema import routing_blocks

HIDDEN = "…"  # in place of header values, which may be credentials


class Place(Struct):
    """An endpoint as one worker sees it; `state` is closed, open or half_open."""

    url: str
    worker: int
    state: str
    open_count: int
    call_count: int
    failed_count: int
    opened_count: int
    first_byte_us: int


class UpstreamInfo(Struct):
    """An upstream, where it was set (``file`` or ``api``), and how its endpoints are."""

    id: str
    source: str
    block: dict[str, Any]
    endpoints: list[Place]


class ModelInfo(Struct):
    """A model, and where it was set (``file`` or ``api``)."""

    id: str
    source: str
    block: dict[str, Any]


class Deleted(Struct):
    """What was deleted; `source` tells whether one of the file holds again."""

    id: str
    source: str


async def list_upstreams(request: web.Request) -> web.Response:
    """List upstreams in force, with the state of each endpoint in each worker."""
    feed = request.app[ROUTING]
    await feed.poll_once()
    states: dict[str, list[Place]] = {}
    for state in feed.states():
        states.setdefault(state.upstream, []).append(_place(state))
    return listing([_upstream(request, block, states.get(block.name, [])) for block in feed.config.upstreams])


async def list_models(request: web.Request) -> web.Response:
    """List models in force that have a block of their own."""
    await request.app[ROUTING].poll_once()
    return listing([_model(request, block) for block in request.app[ROUTING].config.models])


async def add_upstream(request: web.Request, body: Upstream) -> web.Response:
    """Add an upstream; workers use it within two seconds."""
    await _set(request, "upstreams", body, is_new=True)
    return success(_upstream(request, body, []), 201)


async def put_upstream(request: web.Request, body: Upstream) -> web.Response:
    """Set an upstream, whether there is one of that name or not; header values that are not shown stay as they are."""
    known = {block.name: block.headers for block in request.app[ROUTING].config.upstreams}.get(body.name, {})
    headers = {name: known.get(name, value) if value == HIDDEN else value for name, value in body.headers.items()}
    body = msgspec.structs.replace(body, headers=headers)
    await _set(request, "upstreams", body, is_new=False)
    return success(_upstream(request, body, []))


async def delete_upstream(request: web.Request) -> web.Response:
    """Delete an upstream that was set while running."""
    return success(await _delete(request, "upstreams"))


async def add_model(request: web.Request, body: Model) -> web.Response:
    """Add a model; workers use it within two seconds."""
    await _set(request, "models", body, is_new=True)
    return success(_model(request, body), 201)


async def put_model(request: web.Request, body: Model) -> web.Response:
    """Set a model, whether there is one of that name or not."""
    await _set(request, "models", body, is_new=False)
    return success(_model(request, body))


async def delete_model(request: web.Request) -> web.Response:
    """Delete a model that was set while running."""
    return success(await _delete(request, "models"))


async def _set(request: web.Request, kind: str, body: Upstream | Model, is_new: bool) -> None:
    feed, name = request.app[ROUTING], body.name
    if not is_new and request.match_info["id"] != name:
        raise GatewayError("UNPROCESSABLE", f"name: {name!r} is not the one in the path", param="name")
    block = written(msgspec.json.decode(msgspec.json.encode(body)))
    async with request.app[STORE].writing() as connection:
        changed_at = await _turn(connection)
        if is_new and (name in feed.configured(kind) or await _is_there(connection, kind, name)):
            raise GatewayError("CONFLICT", f"{name!r} is there already; PUT replaces it", param="name")
        before = await blocks_set(connection)
        row = {"kind": kind, "name": name, "block": block, "changed_at": changed_at}
        wanted = insert_into(routing_blocks, connection.dialect).values(**row)
        await connection.execute(wanted.on_conflict_do_update(index_elements=["kind", "name"], set_=row))
        await feed.check(connection, before, (kind, name))
        shown = block | ({"headers": _hidden(block["headers"])} if block.get("headers") else {})
        await note(connection, request[CALLER], f"{kind}.set", name, shown)
    await _tell(request)


async def _delete(request: web.Request, kind: str) -> Deleted:
    feed, name = request.app[ROUTING], request.match_info["id"]
    async with request.app[STORE].writing() as connection:
        await _turn(connection)
        if not await _is_there(connection, kind, name):
            if name in feed.configured(kind):
                raise GatewayError("CONFLICT", f"{name!r} stands in the configuration file; take it out there")
            raise GatewayError("NOT_FOUND", f"no {kind.removesuffix('s')} {name[:100]!r} was set while running")
        before = await blocks_set(connection)
        await connection.execute(delete(routing_blocks).where(*_where(kind, name)))
        await feed.check(connection, before, (kind, name))
        await note(connection, request[CALLER], f"{kind}.delete", name, {})
    await _tell(request)
    return Deleted(name, "file" if name in feed.configured(kind) else "")


async def _turn(connection: AsyncConnection) -> datetime:
    """Let one change after the other be checked over what was there before; return a time later than that of any.

    By the latest time the feed knows that something has changed: clocks of other nodes may be ahead.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(text("LOCK TABLE routing_blocks IN SHARE ROW EXCLUSIVE MODE"))
    newest = await connection.scalar(select(func.max(routing_blocks.c.changed_at)))
    now = datetime.now(UTC)
    return now if newest is None else max(now, newest + timedelta(microseconds=1))


async def _tell(request: web.Request) -> None:
    """Let this node and the others take it."""
    await request.app[ROUTING].poll_once()
    await request.app[BUS].tell(TOPIC)


async def _is_there(connection: AsyncConnection, kind: str, name: str) -> bool:
    found = await connection.execute(select(routing_blocks.c.name).where(*_where(kind, name)))
    return found.first() is not None


def _where(kind: str, name: str) -> tuple[Any, Any]:
    return routing_blocks.c.kind == kind, routing_blocks.c.name == name


def _upstream(request: web.Request, upstream: Upstream, endpoints: list[Place]) -> UpstreamInfo:
    block = written(msgspec.json.decode(msgspec.json.encode(upstream)))
    block["headers"] = _hidden(block["headers"])
    return UpstreamInfo(upstream.name, _source(request, "upstreams", upstream.name), block, endpoints)


def _model(request: web.Request, model: Model) -> ModelInfo:
    block = written(msgspec.json.decode(msgspec.json.encode(model)))
    return ModelInfo(model.name, _source(request, "models", model.name), block)


def _source(request: web.Request, kind: str, name: str) -> str:
    return "api" if (kind, name) in request.app[ROUTING].set_names else "file"


def _hidden(headers: dict[str, str]) -> dict[str, str]:
    return dict.fromkeys(headers, HIDDEN)


def _place(state: EndpointState) -> Place:
    fields = {name: getattr(state, name) for name in Place.__struct_fields__}
    return Place(**fields)
