"""What an MCP call asks for, and what became of it.

A call says what it asks for in its body. From revision 2026-07-28 on headers say it too, and servers refuse a call
whose headers and body differ; so these headers are believed where the body is streamed. Those of older revisions are
never believed. Where the body is at hand it is read, and headers that say something else are refused as the revision
demands (MCP 2026-07-28 Transports, "Header Validation").

What became of it stands in the one JSON-RPC response of the answer, be it JSON or an event stream. The result does not
depend on how the answer was split, and no more than ANSWER_BYTES_MAX of it are held.
"""

from typing import Any

import msgspec
from msgspec import Raw, Struct

from gpuproxy.plugin import (
    EVENT_BYTES_MAX,
    Call,
    EventFilter,
    GatewayError,
    HeaderList,
    Usage,
    UsageReader,
    event_payloads,
    mcp_codec,
)

BATCH = "batch"  # as the method of several messages in one call (revision 2025-03-26)
NAME_FIELDS = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}

METHOD_CHARACTERS_MAX = 100
NAME_CHARACTERS_MAX = 200  # for receipts and prices; rules see the whole name
ID_BYTES_MAX = 256
ANSWER_BYTES_MAX = EVENT_BYTES_MAX
TAIL_BYTES = 8_192  # of a longer answer; `isError` stands at its end

BACKSLASH = 0x5C
_MIRRORED = (b"mcp-protocol-version", b"mcp-method", b"mcp-name")


class RpcError(GatewayError):
    """A refusal with a JSON-RPC code and the id of the request it answers."""

    def __init__(self, code: str, message: str, rpc_id: bytes, rpc_code: int = 0) -> None:
        super().__init__(code, message)
        self.rpc_id = rpc_id
        self.rpc_code = rpc_code  # 0: that of the gateway's own code


class Message(Struct, gc=False):
    """A JSON-RPC message as far as it is metered; `params` as bytes."""

    method: str = ""
    id: Raw = Raw()
    params: Raw = Raw()


class Params(Struct, gc=False):
    """What names a tool, prompt or resource."""

    name: str = ""
    uri: str = ""


class Rpc(Struct, gc=False):
    """What a call asks for: its only message, or a batch. `tools` are those it calls, by their whole names; `may_list`
    tells that it asks for a list of tools.
    """

    method: str
    name: str = ""
    id: bytes = b""
    tools: tuple[str, ...] = ()
    is_request: bool = True
    may_list: bool = False


class _Fault(Struct, gc=False):
    code: int = 0


class _Result(Struct, gc=False, rename="camel"):
    is_error: bool = False
    result_type: Raw = Raw()


class _Answer(Struct, gc=False):
    method: Raw = Raw()
    result: Raw = Raw()
    error: Raw = Raw()


_decode_message = msgspec.json.Decoder(Message).decode
_decode_batch = msgspec.json.Decoder(list[Message]).decode
_decode_params = msgspec.json.Decoder(Params).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_answers = msgspec.json.Decoder(list[_Answer]).decode
_decode_fault = msgspec.json.Decoder(_Fault).decode
_decode_result = msgspec.json.Decoder(_Result).decode


def asked_for(call: Call) -> Rpc | None:
    """Return what a posted call asks for, None if that cannot be told. Raises RpcError for headers that belie the body.

    About 2 µs.
    """
    if call.method != b"POST":
        return None
    body = call.body
    if body is None:
        return mirrored(call.headers)
    rpc = read_body(body)
    if rpc is not None and rpc.method and not call.is_envelope and call.header(b"mcp-method") is not None:
        _check_mirrored(call.headers, rpc)
    return rpc


def read_body(body: bytes) -> Rpc | None:
    """Return what a body asks for, None if it is no JSON-RPC."""
    try:
        if body.lstrip()[:1] == b"[":
            return _batch(_decode_batch(body))
        return _single(_decode_message(body))
    except mcp_codec.UNREADABLE:
        return None


def _single(message: Message) -> Rpc:
    method = message.method
    name = _name(message)
    rpc_id = bytes(message.id)
    is_request = bool(method) and not method.startswith("notifications/")
    tools = (name,) if method == "tools/call" else ()
    return Rpc(method, name, rpc_id if len(rpc_id) <= ID_BYTES_MAX else b"", tools, is_request, method == "tools/list")


def _batch(messages: list[Message]) -> Rpc:
    found = [_single(message) for message in messages]
    names = ", ".join(rpc.name for rpc in found if rpc.name)
    tools = tuple(name for rpc in found for name in rpc.tools)
    return Rpc(BATCH, names, b"", tools, any(rpc.is_request for rpc in found), any(rpc.may_list for rpc in found))


def _name(message: Message) -> str:
    field = NAME_FIELDS.get(message.method)
    if field is None or not bytes(message.params):
        return ""
    name: str = getattr(_decode_params(message.params), field)
    return name


def mirrored(fields: HeaderList) -> Rpc | None:
    """Return what the headers of a revision that binds them to the body ask for, None if they do not say it."""
    found: dict[bytes, str] = {}
    for field, value in fields:
        lower = field.lower()
        if lower in _MIRRORED:
            if lower in found:
                return None  # servers differ in which of two they read
            found[lower] = value.decode("latin-1")
    version, method = found.get(b"mcp-protocol-version", ""), found.get(b"mcp-method", "")
    if not method or not mcp_codec.is_revision(version) or version < mcp_codec.STATELESS_SINCE:
        return None
    name = mcp_codec.unmirrored_name(found.get(b"mcp-name", ""))
    if name is None or (method in NAME_FIELDS and not name):
        return None
    tools = (name,) if method == "tools/call" else ()
    return Rpc(method, name if method in NAME_FIELDS else "", b"", tools, not method.startswith("notifications/"))


def _check_mirrored(fields: HeaderList, rpc: Rpc) -> None:
    told = mirrored(fields)
    if told is None or (told.method == rpc.method and told.name == rpc.name):
        return
    name, header, body = "Mcp-Name", told.name, rpc.name
    if told.method != rpc.method:
        name, header, body = "Mcp-Method", told.method, rpc.method
    message = f"header mismatch: {name} is {header[:100]!r}, the body says {body[:100]!r}"
    raise RpcError("BAD_REQUEST", message, rpc.id, mcp_codec.HEADER_MISMATCH)


def shown(rpc: Rpc) -> tuple[str, str, tuple[str, ...]]:
    """Return method, name and tools as receipts and prices know them: bounded, and a URI without its query."""
    name = rpc.name.partition("?")[0] if rpc.method == "resources/read" else rpc.name
    tools = tuple(tool[:NAME_CHARACTERS_MAX] for tool in rpc.tools)
    return rpc.method[:METHOD_CHARACTERS_MAX], name[:NAME_CHARACTERS_MAX], tools


def outcome_of(payload: bytes) -> str:
    """Return what a message, or a batch, tells of the outcome; empty if it holds no response. The worst counts."""
    try:
        is_batch = payload.lstrip()[:1] == b"["
        found = {_outcome(answer) for answer in (_decode_answers(payload) if is_batch else [_decode_answer(payload)])}
    except mcp_codec.UNREADABLE:
        return ""
    return min(found - {""}, key=_badness, default="")


def _outcome(answer: _Answer) -> str:
    if bytes(answer.method):
        return ""
    if bytes(answer.error) not in (b"", b"null"):
        return f"jsonrpc_error:{_read(_decode_fault, answer.error, _Fault()).code}"
    if not bytes(answer.result):
        return ""
    result: _Result = _read(_decode_result, answer.result, _Result())
    if bytes(result.result_type) == b'"input_required"':
        return "input_required"
    return "tool_error" if result.is_error else "ok"


def _badness(outcome: str) -> tuple[bool, str]:
    return outcome == "ok", outcome  # jsonrpc_error sorts before tool_error


def _read(decode: Any, data: Raw, default: Any) -> Any:
    try:
        return decode(data)
    except mcp_codec.UNREADABLE:
        return default


def outcome_at_end(tail: bytes) -> str:
    """Return the outcome that the end of a long response tells. Its start is lost, so a failure without result would
    not be seen; but such are short.

    Read from behind: there nothing is open, and a string ends at a quote with no backslash before it.
    """
    depth, end = 0, len(tail)
    while True:
        closing = tail.rfind(b'"', 0, end)
        opening = _opening(tail, closing)
        if opening < 0:
            return "ok"
        gap = tail[closing + 1 : end]
        depth += gap.count(b"}") + gap.count(b"]") - gap.count(b"{") - gap.count(b"[")
        if depth == 2 and tail[opening : closing + 1] == b'"isError"' and gap.lstrip().startswith(b":"):
            return "tool_error" if gap.lstrip()[1:].lstrip().startswith(b"true") else "ok"
        end = opening


def _opening(tail: bytes, closing: int) -> int:
    # where the string begins that ends at `closing`, -1 if that is not in sight
    at = closing
    while (at := tail.rfind(b'"', 0, max(at, 0))) >= 0:
        first = at
        while first > 0 and tail[first - 1] == BACKSLASH:
            first -= 1
        if (at - first) % 2 == 0:
            break
    return at


class JsonOutcome:
    """Reads the outcome off a JSON answer."""

    __slots__ = ("_held", "_is_long", "rpc_outcome")

    def __init__(self) -> None:
        self._held = bytearray()
        self._is_long = False
        self.rpc_outcome = ""

    def feed(self, data: bytes) -> None:
        """Hold the answer, or its end if it is long."""
        held = self._held
        held += data
        if self._is_long or len(held) > ANSWER_BYTES_MAX:
            self._is_long = True
            del held[:-TAIL_BYTES]

    def finish(self) -> Usage | None:
        """Read what was held; tokens are not told."""
        held = bytes(self._held)
        self.rpc_outcome = outcome_at_end(held.rstrip()) if self._is_long else outcome_of(held)
        return None


class StreamOutcome(EventFilter):
    """Reads the outcome off an event stream: the response among notifications and requests of the server."""

    __slots__ = ("rpc_outcome",)

    word = b"}"  # every message: a long one shows only its end, and what else would stand there is not known

    def __init__(self) -> None:
        super().__init__()
        self.rpc_outcome = ""

    @property
    def is_terminal(self) -> bool:
        """Tell whether the response has passed: clients hang up then, and have it all."""
        return bool(self.rpc_outcome)

    def feed(self, data: bytes) -> None:
        """Look at the next bytes; whole events, the common case, are not held."""
        if self._held is None and data.endswith(b"\n\n") and len(data) <= EVENT_BYTES_MAX:
            self._ended_in_cr = False
            for payload in event_payloads(data):
                self.take(payload)
        else:
            super().feed(data)

    def take(self, data: bytes) -> None:
        """Read one message."""
        self.rpc_outcome = outcome_of(data) or self.rpc_outcome

    def take_tail(self, tail: bytes) -> None:
        """Read the end of a long one."""
        self.rpc_outcome = outcome_at_end(tail[-TAIL_BYTES:].rstrip())

    def finish(self) -> Usage | None:
        """Read an event whose empty line is missing; tokens are not told."""
        self.flush()
        return None


_: list[type[UsageReader]] = [JsonOutcome, StreamOutcome]
