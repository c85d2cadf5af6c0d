"""The session of a group: a sealed text of those at its servers, which must fit where clients send it."""

import asyncio

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec import Raw
from multidict import CIMultiDict

from gpuproxy.codec.seal import Seal
from gpuproxy.config.mcp import McpGroup
from gpuproxy.control.mcp_answers import RpcError
from gpuproxy.control.mcp_group import Group, Turn
from gpuproxy.control.mcp_inner import Inner, Seat, Told
from gpuproxy.control.mcp_listen import PLACES_BYTES_MAX, STREAMS_MAX, Places

INITIALIZE = {"jsonrpc": Raw(b'"2.0"'), "id": Raw(b"1"), "method": Raw(b'"initialize"')}
SERVERS = tuple(f"server{number}" for number in range(16))


class Open(asyncio.Transport):
    """A connection whose client stays."""

    def is_closing(self) -> bool:
        return False


class Agreeing(Inner):
    """Servers that begin a session with an id of some length."""

    def __init__(self, id_characters: int) -> None:
        super().__init__("")
        self._id = "x" * id_characters

    async def ask(self, request: web.Request, server: str, body: bytes | None, seat: Seat, timeout_s: float) -> Told:
        result = msgspec.json.encode({"protocolVersion": "2025-11-25", "capabilities": {}})
        return Told(server, 200, CIMultiDict({"Mcp-Session-Id": self._id}), response={"result": Raw(result)})


async def begun(id_characters: int) -> web.StreamResponse:
    group = Group(McpGroup("all", SERVERS), Agreeing(id_characters), Seal((bytes(32),)), 1 << 20)
    return await group._initialized(make_mocked_request("POST", "/"), INITIALIZE, b"")


async def test_the_sessions_of_many_servers_fit() -> None:
    assert len((await begun(250)).headers["Mcp-Session-Id"]) < 8_190


async def test_sessions_that_do_not_fit_together_are_refused_at_once() -> None:
    with pytest.raises(RpcError, match="too long"):
        await begun(500)


async def test_streams_of_all_groups_together_are_bounded() -> None:
    inner = Agreeing(8)
    inner.streams_count = STREAMS_MAX
    group = Group(McpGroup("all", SERVERS), inner, Seal((bytes(32),)), 1 << 20)
    seats = {server: Seat("s") for server in SERVERS}
    turn = Turn(make_mocked_request("GET", "/"), {}, None, seats)
    with pytest.raises(RpcError, match="1000 streams are open") as refused:
        await group._heard(turn, dict.fromkeys(seats), Places())
    answer = refused.value.answer(turn.request)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "60")
    assert inner.streams_count == STREAMS_MAX


async def test_a_stream_that_could_not_be_had_is_not_counted() -> None:
    inner = Agreeing(8)  # whose address is none
    group = Group(McpGroup("all", SERVERS), inner, Seal((bytes(32),)), 1 << 20)
    seats = {server: Seat("s") for server in SERVERS}
    request = make_mocked_request("GET", "/", transport=Open())
    with pytest.raises(RpcError, match="no server of the group"):
        await group._heard(Turn(request, {}, None, seats), dict.fromkeys(seats), Places())
    assert inner.streams_count == 0
    await inner.close()


def test_places_too_many_for_a_field_leave_the_oldest_out() -> None:
    places = Places()
    for server in SERVERS:
        event = places.moved(b"id: " + server.encode() + b"x" * 500 + b"\ndata: {}\n\n", server)
    shown = event.split(b"\n")[0].removeprefix(b"id: ").decode()
    assert len(shown) <= PLACES_BYTES_MAX + 1
    assert list(Places(SERVERS, shown).by_server) == list(SERVERS[-len(places.by_server) :])
    assert len(places.by_server) == 7


def test_one_place_too_long_for_a_field_is_none() -> None:
    event = b"id: " + b"x" * (PLACES_BYTES_MAX + 1) + b"\ndata: {}\n\n"
    assert Places().moved(event, "server0").startswith(b"id: ~\n")
