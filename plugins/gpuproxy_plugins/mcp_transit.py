"""What the gateway changes in an MCP call and its answer: names that only one server knows, nothing else.

A call is looked at once. Of a legacy session it goes to the server that began it, with the id that one gave; the
answer carries the client's id again. An id is learnt only from an answer that accepts `initialize`; servers send fresh
ids with refusals too. Calls of revision 2026-07-28 and later know no sessions and go to any server.
"""

from urllib.parse import urljoin, urlsplit

import msgspec
from msgspec import Struct

from gpuproxy.plugin import (
    PROXY_PREFIX,
    AnswerEditor,
    Call,
    GatewayError,
    HeaderList,
    Intent,
    Pin,
    Station,
    UpstreamRequest,
    mcp_codec,
)
from gpuproxy_plugins.mcp_origins import ORIGIN, Origins, made_readable
from gpuproxy_plugins.mcp_sessions import Sealed
from gpuproxy_plugins.mcp_sse import EndpointEditor

SESSION_FIELD = b"Mcp-Session-Id"
STATELESS_SINCE = mcp_codec.STATELESS_SINCE.encode()
ADDRESS = b"/-/at?sessionId="  # below a server's URL: what follows is a sealed address; SDKs show it as session id
MOUNT = PROXY_PREFIX + b"/mcp/"


class _Message(Struct):
    method: str = ""


_decode_message = msgspec.json.Decoder(_Message).decode


class Transits:
    """Reads calls and says what is to be changed."""

    def __init__(self, station: Station, origins: Origins) -> None:
        self.sealed = Sealed(station.seal)
        self._origins = origins
        self._mount = urlsplit(station.public_url).path.rstrip("/").encode() + MOUNT

    def addressed(self, call: Call) -> Intent:
        """Return where a sealed address leads. Raises GatewayError SESSION_GONE."""
        server, _, text = call.path[5:].partition(ADDRESS)
        pin, target = self.sealed.read_address(text)
        if server != pin.upstream.encode():
            raise GatewayError("SESSION_GONE", "this address belongs to another server; begin a new session")
        intent = self.bound(call, Intent(upstream=pin.upstream, path=target))
        if intent.pin is not None and msgspec.structs.replace(intent.pin, is_whole_path=True) != pin:
            raise GatewayError("SESSION_GONE", "this address belongs to another session; begin a new one")
        intent.pin = pin
        intent.note.editor.base = urljoin(pin.url, target.decode("latin-1"))
        return intent

    def bound(self, call: Call, intent: Intent) -> Intent:
        """Bind the intent to the server of the call's session, if it has one. Raises GatewayError SESSION_GONE."""
        text, version, origin = _said(call.headers)
        if origin:
            self._origins.check(origin)
        request = UpstreamRequest()
        transit = request.editor = Transit(self.sealed, self._mount, origin)
        intent.note = request
        if version >= STATELESS_SINCE:
            if text:
                request.headers = [(SESSION_FIELD, b"")]  # it says nothing in these revisions
        elif text:
            intent.pin, server_id = self.sealed.read_session(text)
            request.headers = [(SESSION_FIELD, server_id)]
            transit.session = text, server_id
        elif call.method == b"POST" and _initializes(call.body):
            transit.may_begin = True
            self.sealed.prepare()  # while the call can still be refused
        elif call.method == b"GET":
            request.identity = transit.may_name_address = True
            transit.path = call.path if intent.path is None else intent.path
            self.sealed.prepare()
        return intent


class Transit:
    """The head of one answer on its way to the client."""

    __slots__ = ("_mount", "_origin", "_sealed", "base", "may_begin", "may_name_address", "path", "session")

    def __init__(self, sealed: Sealed, mount: bytes, origin: bytes) -> None:
        self._sealed = sealed
        self._mount = mount  # as the client sees it
        self._origin = origin  # of the page that calls
        self.session: tuple[bytes, bytes] | None = None  # as the client and the server call it
        self.may_begin = False
        self.may_name_address = False
        self.path = b""  # of a call whose answer may name an address, for one that is relative to it
        self.base = ""  # instead, if all of the URL is known before the call

    def edit_head(self, status: int, fields: HeaderList, pin: Pin) -> tuple[HeaderList, AnswerEditor | None]:
        """Give the session its name, and lead redirects and the first event's address through the gateway."""
        for name, value in fields:
            if len(name) == len(SESSION_FIELD) and name.lower() == b"mcp-session-id":
                fields = self._renamed(status, fields, value, pin)
                break
        if 300 <= status < 400:
            fields = [self._relocated(field, pin) for field in fields]
        if self._origin:
            fields = made_readable(fields, self._origin)
        if self.may_name_address and status == 200:
            return fields, EndpointEditor(lambda address: self._address(address, pin))
        return fields, None

    def _renamed(self, status: int, fields: HeaderList, server_id: bytes, pin: Pin) -> HeaderList:
        rest = [field for field in fields if field[0].lower() != b"mcp-session-id"]
        if self.session is not None:
            text = self.session[0] if server_id == self.session[1] else b""
        else:
            text = self._sealed.session(pin, server_id) if self.may_begin and status < 300 else b""
        return [*rest, (SESSION_FIELD, text)] if text else rest

    def _relocated(self, field: tuple[bytes, bytes], pin: Pin) -> tuple[bytes, bytes]:
        name, value = field
        if name.lower() != b"location":
            return field
        try:
            return name, self._through(value, pin)
        except (ValueError, GatewayError):  # no URL; or without the secrets a client can be led nowhere
            return field

    def _address(self, address: bytes, pin: Pin) -> bytes:
        base = self.base or pin.url.rstrip("/") + self.path.partition(b"?")[0].decode("latin-1")
        try:
            return self._sealed_path(_target(address, base), pin)
        except ValueError:  # no URL: for the client to complain of
            return address

    def _through(self, location: bytes, pin: Pin) -> bytes:
        # to the same place, but through the gateway; one to elsewhere stays as it is
        parts, base = urlsplit(location.decode("latin-1")), urlsplit(pin.url)
        if parts.netloc and (parts.scheme or base.scheme, parts.netloc) != (base.scheme, base.netloc):
            return location
        if not parts.netloc and not parts.path.startswith("/"):
            return location  # relative to the call's own path, which ends alike
        target = _target(location, pin.url)
        base_path = base.path.rstrip("/").encode("latin-1")
        rest = target[len(base_path) :]
        if target.startswith(base_path) and rest[:1] in (b"", b"/", b"?"):
            return self._mount + pin.upstream.encode() + rest
        return self._sealed_path(target, pin)

    def _sealed_path(self, target: bytes, pin: Pin) -> bytes:
        return self._mount + pin.upstream.encode() + ADDRESS + self._sealed.address(pin, target)


def at_target(call: Call) -> Intent:
    """Return the intent of an envelope: what has a session, or begins one, stays at the URL that the caller names."""
    text, version, _ = _said(call.headers)
    has_session = version < STATELESS_SINCE and bool(text or _initializes(call.body))
    return Intent(pin=Pin("", "", "")) if has_session else Intent()


def _target(address: bytes, url: str) -> bytes:
    """Return path and query of an address a server has named."""
    parts = urlsplit(urljoin(url, address.decode("latin-1")))
    path = parts.path or "/"
    return (f"{path}?{parts.query}" if parts.query else path).encode("latin-1")


def _said(headers: HeaderList) -> tuple[bytes, bytes, bytes]:
    """Return session id, protocol version and origin."""
    session = version = origin = b""
    for name, value in headers:
        lower = name.lower()
        if lower == b"mcp-session-id":
            session = value
        elif lower == b"mcp-protocol-version":
            version = value
        elif lower == ORIGIN:
            origin = value
    return session, version, origin


def _initializes(body: bytes | None) -> bool:
    try:
        return body is not None and _decode_message(body).method == "initialize"
    except mcp_codec.UNREADABLE:
        return False
