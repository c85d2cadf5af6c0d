"""Upstreams and targets behind TLS: who they are is proved before a byte goes there."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
from clients.tls import DAY, Authority

from .conftest import Serve
from .harness import ENVELOPE, KEY, OK, RAW, answered, request
from .wire import Listener

TLS = RAW.replace(b"raw", b"tls")


class TlsUpstream:
    """A server behind TLS that notes which name it was asked for, and what came."""

    def __init__(self) -> None:
        self.names: list[str | None] = []
        self.protocols: list[str | None] = []
        self.streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._server: asyncio.Server
        self.port = 0

    async def start(self, context: ssl.SSLContext, host: str = "127.0.0.1") -> None:
        """Listen."""
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.sni_callback = lambda _, name, __: self.names.append(name)
        self._server = await asyncio.start_server(self._serve, host, 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.protocols.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await self.streams.put((reader, writer))

    async def take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        """Return the next connection and the head of its first request."""
        async with asyncio.timeout(5):
            reader, writer = await self.streams.get()
            return reader, writer, await reader.readuntil(b"\r\n\r\n")

    async def close(self) -> None:
        """Stop."""
        self._server.close()
        while not self.streams.empty():
            self.streams.get_nowait()[1].close()
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def upstream() -> AsyncIterator[TlsUpstream]:
    """A server that is not started yet."""
    made = TlsUpstream()
    yield made
    if made.port:
        await made.close()


def _call_of(url: str) -> bytes:
    return request(b"POST " + ENVELOPE, body=b'{"protocol":"https","target_url":"%b/x"}' % url.encode())


def _configured(url: str, authority: Authority | None, **says: Any) -> dict[str, Any]:
    ca_file = str(authority.ca_file) if authority is not None else ""
    return {"upstreams": [{"name": "tls", "protocol": "https", "urls": [url], "ca_file": ca_file, **says}]}


async def test_an_upstream_is_asked_by_its_name_and_kept(
    serve: Serve, authority: Authority, upstream: TlsUpstream
) -> None:
    await upstream.start(authority.context("localhost"))
    gateway = await serve(**_configured(f"https://localhost:{upstream.port}", authority))
    client = await gateway.ask(request(b"GET " + TLS + b"/x"))
    reader, writer, head = await upstream.take()
    assert head.startswith(b"GET /x HTTP/1.1\r\nHost: localhost:%d\r\n" % upstream.port)
    for _ in range(2):
        writer.write(OK)
        assert (await client.answer()).body == b"ok"
        await client.send(request(b"GET " + TLS + b"/x"))
        await reader.readuntil(b"\r\n\r\n")
    writer.write(OK)
    assert (await client.answer()).body == b"ok"
    assert (upstream.names, upstream.protocols) == (["localhost"], ["http/1.1"])
    writer.close()


REFUSED = {
    "another name": ("other.example", True, 0),
    "another authority": ("localhost", False, 0),
    "expired": ("localhost", True, 30),
    "not valid yet": ("localhost", True, -30),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("is_target", [False, True])
async def test_who_cannot_prove_its_name_gets_nothing(
    serve: Serve, authority: Authority, upstream: TlsUpstream, why: str, is_target: bool
) -> None:
    host, is_believed, days = REFUSED[why]
    await upstream.start(authority.context(host, ago=days * DAY))
    url = f"https://localhost:{upstream.port}"
    believed = authority if is_believed else None
    if is_target:
        ca_file = str(authority.ca_file) if is_believed else ""
        gateway = await serve(egress={"allow": ["127.0.0.0/8", "::1/128"], "ca_file": ca_file})
        client = await gateway.ask(_call_of(url))
    else:
        gateway = await serve(**_configured(url, believed))
        client = await gateway.ask(request(b"GET " + TLS + b"/x"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_UNREACHABLE")
    assert "TLS: " in answer.json()["error"]
    assert upstream.streams.empty()


async def test_an_operator_may_believe_any_certificate(
    serve: Serve, authority: Authority, upstream: TlsUpstream
) -> None:
    await upstream.start(authority.context("other.example", ago=30 * DAY))
    gateway = await serve(**_configured(f"https://localhost:{upstream.port}", None, verify_tls=False))
    client = await gateway.ask(request(b"GET " + TLS + b"/x"))
    _, writer, _ = await upstream.take()
    writer.write(OK)
    assert (await client.answer()).body == b"ok"
    writer.close()


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
async def test_a_target_may_be_an_address(
    serve: Serve, authority: Authority, upstream: TlsUpstream, host: str, shown: str
) -> None:
    await upstream.start(authority.context(host), host)
    gateway = await serve(egress={"allow": [f"{host}"], "ca_file": str(authority.ca_file)})
    client = await gateway.ask(_call_of(f"https://{shown}:{upstream.port}"))
    _, writer, head = await upstream.take()
    assert head.startswith(b"GET /x HTTP/1.1\r\nHost: %b:%d\r\n" % (shown.encode(), upstream.port))
    writer.write(OK)
    assert (await client.answer()).json()["status_code"] == 200
    assert upstream.names == [None], "an address is no server name, RFC 6066 §3"
    writer.close()


async def test_a_server_without_tls_is_a_502(serve: Serve, pair: tuple[Listener, Listener]) -> None:
    gateway = await serve(**_configured(f"https://127.0.0.1:{pair[0].port}", None))
    client = await gateway.ask(request(b"GET " + TLS + b"/x"))
    upstream = await pair[0].accept()
    await upstream.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_UNREACHABLE")
    assert KEY not in await upstream.read_to_end()


async def test_who_leaves_stops_an_upstream_behind_tls_too(
    serve: Serve, authority: Authority, upstream: TlsUpstream
) -> None:
    await upstream.start(authority.context("localhost"))
    gateway = await serve(**_configured(f"https://localhost:{upstream.port}", authority))
    client = await gateway.ask(request(b"GET " + TLS + b"/x"))
    reader, writer, _ = await upstream.take()
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    await client.expect(answered(b"200 OK", framing=b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n"))
    client.close()
    async with asyncio.timeout(1):
        with contextlib.suppress(ConnectionError):
            await reader.read()
    assert (await gateway.receipt()).outcome == "client_gone"
    writer.close()


async def test_a_slow_reader_stops_an_upstream_behind_tls_too(
    serve: Serve, authority: Authority, upstream: TlsUpstream
) -> None:
    await upstream.start(authority.context("localhost"))
    gateway = await serve(**_configured(f"https://localhost:{upstream.port}", authority))
    client = await gateway.ask(request(b"GET " + TLS + b"/x"))
    _, writer, _ = await upstream.take()
    size = 48 << 20
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    sent = 0
    (downstream,) = gateway.plane.downstreams
    while not downstream.is_write_blocked:
        writer.write(b"a" * 65_536)
        sent += 65_536
        await gateway.turn()
        assert sent < size
    assert downstream.transport.get_write_buffer_size() < 2 << 20
    await client.read_head()
    writer.write(b"a" * (size - sent))
    received = 0
    while received < size:
        received += len(await client.read(min(1 << 20, size - received)))
    assert (await gateway.receipt()).outcome == "ok"
    writer.close()
