"""A whole data plane in the test's own loop, with scripted peers, a real link and a clock of its own.

A test is a transcript: what the client sends, what the upstream gets, what it answers, what the client gets,
then the receipt. When it ends, every exchange that was started must have written exactly one receipt, no
connection may be left in use, and nothing may have failed unseen.
"""

import asyncio
import contextlib
import hashlib
import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from gpuproxy.codec.key import generate
from gpuproxy.config import Config, build
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import Hello
from gpuproxy.link.server import LinkServer
from gpuproxy.plugin import Registry, load_plugins
from gpuproxy.proxy.downstream import Downstream
from gpuproxy.proxy.exchange import Exchange
from gpuproxy.proxy.journal import Journal
from gpuproxy.proxy.route import CONTROL
from gpuproxy.proxy.worker import SWEEP_S, Plane
from gpuproxy.types import Grant, Receipt

from .wire import WAIT_S, Listener, Wire

KEY = b"gp_nBk4I8DXJrWmsw8pWKRhgW1bKurdQ4MWw8IW9BFzGK40HJAf0"  # the same wherever tests are collected
PREFIX = b"/api/v1/gpu/proxy"
RAW = PREFIX + b"/upstreams/raw"
CHAT = b"/v1/chat/completions"
ENVELOPE = PREFIX
WARM = "warm"  # the request id of calls that belong to no transcript


async def until(condition: Callable[[], bool], what: str = "a condition") -> None:
    """Let the loop run until `condition` holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        await asyncio.sleep(0.001)


class Keys:
    """What control knows: answers the link's questions. Clear `gate` to let questions wait."""

    def __init__(self) -> None:
        self.grants: dict[bytes, Grant] = {}
        self.questions: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_broken = False

    def add(self, key: bytes = b"", **says: Any) -> bytes:
        """Make a key known and return it; `says` are fields of its grant."""
        key = key or generate().encode()
        says.setdefault("key_id", f"key{len(self.grants)}")
        says.setdefault("user_id", "user")
        self.grants[hashlib.sha256(key).digest()] = Grant(**says)
        return key

    async def authorize(self, digest: bytes) -> Grant | None:
        """Answer one question."""
        self.questions.append(digest)
        await self.gate.wait()
        if self.is_broken:
            raise OSError("the store is away")
        return self.grants.get(digest)


class Clock:
    """The loop's clock plus what a test lets pass."""

    def __init__(self) -> None:
        self._time = asyncio.get_running_loop().time
        self.passed_s = 0.0

    def __call__(self) -> float:
        """Return seconds."""
        return self._time() + self.passed_s


class Gateway:
    """A running data plane and everything around it."""

    def __init__(self, directory: Path, config: Config, registry: Registry | None) -> None:
        self.directory = directory
        self.config = config
        self.registry = registry or load_plugins(config.plugins.enabled)
        self.keys = Keys()
        self.keys.add(KEY)
        self.link_server = LinkServer(self.keys.authorize, timeout_s=WAIT_S, remember_s=60)
        self.link_server.seating.open()  # there is one worker
        self.link_server.seal_keys = (b"one key of 32 bytes for sessions",)
        self.clients: list[Wire] = []
        self.failures: list[dict[str, Any]] = []
        self.may_fail = False  # set by tests of what happens when something inside does
        self.port = 0
        self.llm: Listener
        self.tools: Listener
        self.raw: Listener
        self.control: Listener
        self.plane: Plane
        self.started: list[Exchange] = []
        self.link: LinkClient
        self._linking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring everything up."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.failures.append(context))
        link_path = str(self.directory / "link")
        await self.link_server.start(_unix_listener(link_path))
        self.link = LinkClient(link_path, Hello(0, 1, "000-test"))
        journal = Journal(self.directory / "journal", "000-test", self.config.journal)
        self.plane = Plane(self.config, self.registry, self.link, journal, str(self.directory / "control"))
        self.clock = self.plane._time = self.plane.admission._now = Clock()  # the one thing taken from inside
        server = await loop.create_server(lambda: Downstream(self.plane), "127.0.0.1", 0)
        self._server = server
        self.port = server.sockets[0].getsockname()[1]
        self._linking = loop.create_task(self.link.run())
        await until(self.link.connected.is_set, "the link")
        await self.warm(KEY)

    async def warm(self, key: bytes) -> None:
        """Let the plane learn a key, so that calls with it go through in one turn."""
        client = await self.ask(request(b"GET " + PREFIX + b"/none", key=key, id=WARM.encode()))
        assert (await client.answer()).status == 404
        client.close()
        self.keys.questions.clear()

    async def client(self) -> Wire:
        """Connect a client."""
        sock = socket.socket()
        sock.setblocking(False)
        wire = Wire(sock)
        self.clients.append(wire)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return wire

    async def ask(self, data: bytes) -> Wire:
        """Connect a client that sends `data`."""
        client = await self.client()
        await client.send(data)
        return client

    async def answer_one(self, listener: Listener) -> bytes:
        """Let an upstream take one request on a new connection and answer OK; returns the request's head."""
        upstream = await listener.accept()
        head = await upstream.read_head()
        await upstream.send(OK)
        return head

    def passes(self, seconds: float) -> None:
        """Let time pass and act on every deadline."""
        self.clock.passed_s += seconds + 2 * SWEEP_S  # deadlines are set from the last sweep's time
        self.plane.sweep()

    async def turn(self) -> None:
        """Let everything that can happen now happen."""
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)  # the kernel hands bytes over in its own time

    def unsent_upstream_bytes(self) -> int:
        """Return what the plane holds for upstreams that do not take it."""
        running = [exchange.upstream for exchange in self.started if exchange.upstream is not None]
        return sum(connection.transport.get_write_buffer_size() for connection in running)

    def receipts(self) -> list[Receipt]:
        """Return all receipts written so far, read from the journal's files."""
        self.plane.journal.flush()
        paths = sorted((self.directory / "journal").iterdir())
        return [receipt for path in paths for receipt in _receipts(path) if receipt.request_id != WARM]

    async def receipt(self, number: int = 1) -> Receipt:
        """Return the only receipt, or the last of `number`."""
        await until(lambda: len(self.receipts()) >= number, f"{number} receipts")
        found = self.receipts()
        assert len(found) == number, found
        return found[-1]

    async def sent_to(self, listener: Listener) -> bytes:
        """Return all that reached an upstream on its next connection, empty if there was none."""
        await until(lambda: not self.plane._tasks, "connections to be made")
        self.passes(60)
        return b"" if listener.is_untouched() else await (await listener.accept()).read_to_end()

    async def cut_link(self) -> None:
        """Take control away."""
        assert self._linking is not None
        self._linking.cancel()
        await self.link_server.close()
        await until(lambda: not self.link.connected.is_set(), "the link's end")

    async def stop(self) -> None:
        """End everything and check what must hold after any test."""
        for wire in self.clients:
            wire.close()
        try:
            await self._come_to_rest()
        finally:
            await self._end()
        receipts = [receipt for receipt in self.receipts() if receipt.outcome != "open"]
        self.plane.journal.close()
        assert not self.failures, self.failures
        assert sorted(receipt.request_id for receipt in receipts) == sorted(self._billed_ids())
        assert self.may_fail or not [receipt for receipt in receipts if receipt.error == "INTERNAL"]

    async def _come_to_rest(self) -> None:
        plane = self.plane
        await until(lambda: not plane.downstreams and not plane.tunnels and not plane._tasks, "the connections' end")
        await until(self._is_idle, "upstream connections to be let go")

    async def _end(self) -> None:
        """Leave nothing behind, whatever went wrong: the loop cannot be closed over open connections."""
        plane = self.plane
        for downstream in list(plane.downstreams):
            downstream.transport.abort()
        for exchange in self.started:
            if exchange.upstream is not None:
                exchange.upstream.transport.abort()
        for ends in list(plane.tunnels.values()):
            ends[0].close()
        self._server.close()
        plane.pools.close()
        assert self._linking is not None
        self._linking.cancel()
        await self.link_server.close()
        for listener in (self.llm, self.tools, self.raw, self.control):
            listener.close()
        await asyncio.sleep(0)

    def _billed_ids(self) -> list[str]:
        billed = [exchange.request_id for exchange in self.started if exchange.route.kind != CONTROL]
        return [request_id for request_id in billed if request_id != WARM]

    def _is_idle(self) -> bool:
        return all(origin._connections == len(origin.idle) for origin in self.plane.pools._origins.values())


@contextlib.asynccontextmanager
async def running(
    directory: Path, started: list[Exchange], registry: Registry | None = None, **tree: Any
) -> AsyncIterator[Gateway]:
    """Run a gateway with three scripted upstreams; `tree` are sections of the config."""
    listeners = {name: Listener() for name in ("llm", "tools", "raw")}
    llm = {"name": "llm", "protocol": "openinference", "urls": [_url(listeners["llm"])], "models": ["m", "m2"]}
    upstreams = [
        {**llm, "include_usage": False},  # bodies pass byte-exact
        {"name": "tools", "protocol": "mcp", "urls": [_url(listeners["tools"], "/mcp")]},
        {"name": "raw", "protocol": "https", "urls": [_url(listeners["raw"])]},
    ]
    tree["upstreams"] = [{**upstream, **tree.pop(str(upstream["name"]), {})} for upstream in upstreams] + list(
        tree.get("upstreams", ())
    )
    gateway = Gateway(directory, build(tree), registry)
    gateway.started = started
    gateway.llm, gateway.tools, gateway.raw = listeners["llm"], listeners["tools"], listeners["raw"]
    gateway.control = Listener(str(directory / "control"))
    try:
        await gateway.start()
        yield gateway
    finally:
        await gateway.stop()


def _url(listener: Listener, path: str = "") -> str:
    return f"http://127.0.0.1:{listener.port}{path}"


def _unix_listener(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    return sock


def _receipts(path: Path) -> list[Receipt]:
    data = path.read_bytes()
    found: list[Receipt] = []
    while data:
        length, check = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
        payload, data = data[8 : 8 + length], data[8 + length :]
        assert zlib.crc32(payload) == check
        found += msgspec.msgpack.decode(payload, type=list[Receipt])
    return found


# -- the bytes of a transcript ----------------------------------------------------------------------------


def lines(*fields: bytes) -> bytes:
    """Return header lines."""
    return b"".join(field + b"\r\n" for field in fields)


def request(line: bytes, *fields: bytes, body: bytes | None = None, key: bytes = KEY, id: bytes = b"t1") -> bytes:
    """Return a client's request; `line` is method and target."""
    own = [b"Host: gw"]
    if key:
        own.append(b"X-API-Key: " + key)
    if id:
        own.append(b"X-Request-Id: " + id)
    framing = [] if body is None else [b"Content-Length: %d" % len(body)]
    return line + b" HTTP/1.1\r\n" + lines(*own, *fields, *framing) + b"\r\n" + (body or b"")


def forwarded(
    line: bytes,
    *fields: bytes,
    port: int,
    framing: bytes = b"",
    body: bytes = b"",
    id: bytes = b"t1",
    via: bytes = b"1.1 gpuproxy",
) -> bytes:
    """Return what the upstream at `port` gets for a `request`."""
    return (
        line
        + b" HTTP/1.1\r\n"
        + lines(
            b"Host: 127.0.0.1:%d" % port,
            *fields,
            b"Via: " + via,
            b"X-Forwarded-For: 127.0.0.1",
            b"X-Forwarded-Proto: http",
            b"X-Forwarded-Host: gw",
            b"X-Request-Id: " + id,
        )
        + (framing + b"\r\n" if framing else b"")
        + b"\r\n"
        + body
    )


def answered(
    status: bytes, *fields: bytes, framing: bytes = b"", body: bytes = b"", id: bytes = b"t1", last: bytes = b""
) -> bytes:
    """Return what the client gets for an upstream's answer; `last` is a field after the framing."""
    return (
        b"HTTP/1.1 "
        + status
        + b"\r\n"
        + lines(*fields, b"X-Request-Id: " + id)
        + (framing + b"\r\n" if framing else b"")
        + (last + b"\r\n" if last else b"")
        + b"\r\n"
        + body
    )


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
OK_SENT = answered(b"200 OK", framing=b"Content-Length: 2", body=b"ok")
OK_SENT_AGAIN = answered(b"200 OK", framing=b"Content-Length: 2", body=b"ok", last=b"X-Gpuproxy-Attempts: 2")
