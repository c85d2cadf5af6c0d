"""The connection below ``/ws``, byte by byte: its end, its heartbeat, what comes early or is not of the protocol."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import ClientError, web

from gpuproxy.access.callers import Caller
from gpuproxy.codec.websocket import TEXT, close_frame
from gpuproxy.control import listener, web_socket
from gpuproxy.control.events import beat, close_all
from gpuproxy.control.frames import CLOSE, PING, PONG, frame
from gpuproxy.control.identify import identify
from gpuproxy.control.parts import HUB, LISTENERS

from .conftest import Api
from .test_frames import masked

WAIT_S = 20
HEAD = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
SAY_PING = masked(TEXT, b'{"type":"ping"}')
PONG_TEXT = frame(TEXT, b'{"type":"pong","payload":{}}')


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database: nothing here depends on the kind."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


class Wire:
    """A client that sends bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read(self, expected: bytes) -> None:
        async with asyncio.timeout(WAIT_S):
            assert await self.reader.readexactly(len(expected)) == expected

    async def rest(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()


async def connect(api: Api, with_it: bytes = b"") -> Wire:
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    writer.write(HEAD + with_it)
    async with asyncio.timeout(WAIT_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return Wire(reader, writer)


@pytest.mark.parametrize("version", ["8", "14", "13, 8", ""])
async def test_who_speaks_another_version_is_told_which_is_spoken(api: Api, version: str) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": version}
    async with api.client.get("/ws", headers=headers | {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}) as answer:
        assert (answer.status, answer.headers["Sec-WebSocket-Version"]) == (426, "13")
        assert (await answer.json())["code"] == "UPGRADE_REQUIRED"


async def gone(api: Api) -> None:
    async with asyncio.timeout(WAIT_S):
        while api.client.app[LISTENERS]:
            await asyncio.sleep(0.005)


async def test_what_comes_with_the_request_is_heard(api: Api) -> None:
    wire = await connect(api, SAY_PING)
    await wire.read(PONG_TEXT)
    wire.writer.write(SAY_PING * 3 + masked(PING, b"hi"))
    await wire.read(frame(PONG, b"hi") + PONG_TEXT * 3)
    wire.writer.close()
    await gone(api)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (masked(0x2, b"{}"), 1003),
        (masked(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"{}"), 1002),
        (masked(CLOSE, b""), 1000),
        (masked(CLOSE, b"\x03\xe9bye"), 1001),
        (masked(CLOSE, b"x"), 1002),
        (masked(CLOSE, b"\x03\xed"), 1002),
        (masked(PING, b"") * (web_socket.PINGS_MAX + 1), 1008),
    ],
    ids=[
        "binary",
        "no utf-8",
        "unmasked",
        "close",
        "close with code",
        "close with half a code",
        "close with no code",
        "pings",
    ],
)
async def test_the_end_has_its_code(api: Api, sent: bytes, code: int) -> None:
    wire = await connect(api, sent)
    head = close_frame(code)
    while (got := await wire.reader.readexactly(2)) == frame(PONG, b""):
        pass
    got += await wire.reader.readexactly(2)
    assert (got[0], got[2:]) == (head[0], head[2:])
    wire.writer.write(masked(CLOSE, b""))
    await wire.rest()
    wire.writer.close()
    await gone(api)


async def test_who_answers_a_heartbeat_stays_and_who_does_not_goes(api: Api) -> None:
    living, dead = await connect(api), await connect(api)
    for _ in range(3):
        beat(api.client.app)
        await living.read(frame(PING, b""))
        living.writer.write(masked(PONG, b"") + SAY_PING)
        await living.read(PONG_TEXT)
    assert len(api.client.app[LISTENERS]) == 1
    assert await dead.rest() == frame(PING, b"")
    living.writer.close()
    dead.writer.close()


async def test_who_asks_and_reads_no_answer_is_heard_no_more(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_socket, "PINGS_MAX", 1_000_000)
    wire = await connect(api)
    (heard,) = api.client.app[LISTENERS]
    question = masked(PING, bytes(125)) * 1_000
    async with asyncio.timeout(WAIT_S):
        while heard.socket.is_writable:  # what the system holds must be full first
            wire.writer.write(question)
            await asyncio.sleep(0)
    for _ in range(100):
        wire.writer.write(question)
        await asyncio.sleep(0)
    assert heard.socket._transport.get_write_buffer_size() < 1_000_000
    beat(api.client.app)
    beat(api.client.app)  # it says nothing now
    await gone(api)
    wire.writer.close()


async def test_who_takes_long_to_read_is_not_dead(api: Api) -> None:
    wire = await connect(api)
    (heard,) = api.client.app[LISTENERS]
    while heard.socket.is_writable:
        heard.socket.send("x" * 65_536)
    beat(api.client.app)
    async with asyncio.timeout(WAIT_S):
        while not heard.socket.is_writable:
            await wire.reader.read(65_536)
    beat(api.client.app)
    wire.writer.write(SAY_PING)
    async with asyncio.timeout(WAIT_S):
        while not (await wire.reader.read(65_536)).endswith(PONG_TEXT):
            pass
    wire.writer.close()
    await gone(api)


async def test_who_says_goodbye_and_takes_nothing_more_is_cut_off(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_socket, "CLOSE_S", 0.05)
    wire = await connect(api)
    (heard,) = api.client.app[LISTENERS]
    while not heard.socket._transport.get_write_buffer_size():  # what the system holds must be full
        heard.socket.send("x" * 1_000)
    assert heard.socket.is_writable
    wire.writer.write(masked(CLOSE, b""))
    await gone(api)
    wire.writer.close()


async def test_who_leaves_before_the_answer_is_forgotten(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = await api.person()

    async def identify_as_it_leaves(request: web.Request) -> Caller:
        caller = await identify(request)
        assert request.transport is not None
        request.transport.abort()
        return caller

    monkeypatch.setattr(listener, "identify", identify_as_it_leaves)
    with pytest.raises(ClientError):
        await api.client.ws_connect("/ws", headers=ann.by_key)
    await gone(api)
    assert api.client.app[HUB]._by_user == {}


async def test_a_gateway_that_stops_says_so_and_waits_for_the_answer(api: Api) -> None:
    wire = await connect(api)
    stopping = asyncio.create_task(close_all(api.client.app))
    await wire.read(close_frame(1001, "the gateway is stopping"))
    assert not stopping.done()
    wire.writer.write(masked(CLOSE, b"\x03\xe9"))
    async with asyncio.timeout(WAIT_S):
        await stopping
    assert (await wire.rest(), len(api.client.app[LISTENERS])) == (b"", 0)
    wire.writer.close()


async def test_plain_http_is_told_what_is_spoken(api: Api) -> None:
    status, told = await api.call("GET", "/ws")
    assert (status, told["code"]) == (400, "BAD_REQUEST")
    assert "WebSocket" in told["error"]
