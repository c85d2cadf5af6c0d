"""Keys that are bound to tools: calls of other tools are refused, and lists of tools show what the key may use.

What runs is what the server reads in the message, and servers do not all read alike. So a message of such a key is
refused if it can be read in two ways: a name that stands twice, or in other letters than MCP's; and so is any message
where one of the ways calls a tool that costs. Lists are told by their
shape, ``result.tools``, for an answer may also come on the stream of another call (revisions with sessions). A server
that sends a list compressed, though it was asked not to, shows all of it; calls are refused all the same.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Raw, Struct

from gpuproxy.plugin import (
    AnswerEditor,
    Call,
    EventCutter,
    HeadEditor,
    HeaderList,
    Pin,
    UpstreamRequest,
    may_use,
    mcp_codec,
    with_data,
)
from gpuproxy_plugins.mcp_meter import Rpc, RpcError

HELD_BYTES_MAX = 4 << 20  # of a list, or of one event; a list that is longer is not shown
OBJECTS_MAX, PARTS_MAX = 50_000, 1_000_000  # of a message; to read so many holds all other calls up for 0.3 s
_WORDS = ("method", "params", "name")

Keep = Callable[[str], bool]


class _Tool(Struct, gc=False):
    name: str = ""


_decode_list = msgspec.json.Decoder(list[Raw]).decode
_decode_tool = msgspec.json.Decoder(_Tool).decode


class _Pairs(tuple[tuple[str, Any], ...]):
    """An object with all its names, as often as they stand there."""


def bound(call: Call, request: UpstreamRequest) -> UpstreamRequest:
    """Bind a call to the tools its key may use. Raises RpcError FORBIDDEN, BAD_REQUEST."""
    rpc = call.note
    if call.body:
        _check(call, rpc)
    if rpc is None or rpc.may_list:
        request.identity = True
        editor = request.editor
        assert editor is None or hasattr(editor, "edit_head")
        request.editor = BoundHead(editor, kept(call))
    return request


def kept(call: Call) -> Keep:
    """Return what tells whether the key of a call may use a tool of its server."""
    assert call.tools is not None
    allowed, server = may_use(call.tools), call.upstream
    return lambda tool: allowed(server, tool)


def _check(call: Call, rpc: Rpc | None) -> None:
    if rpc is None or not _is_plain(call.body or b""):
        message = "this API key is bound to tools, and this message cannot be read in one way only; send plain JSON-RPC"
        raise RpcError("BAD_REQUEST", message, rpc.id if rpc is not None else b"")
    keep = kept(call)
    for tool in rpc.tools:
        if not keep(tool):
            message = f"this API key may not use tool {call.upstream + '/' + tool[:100]!r}"
            raise RpcError("FORBIDDEN", message, rpc.id)


def _pairs_in(body: bytes) -> Any:
    """Return a message with every object as pairs. Raises ValueError, RecursionError for one that cannot be read.

    Long texts are read in no time, but of small objects 16 MiB take seconds.
    """
    if body.count(b"{") > OBJECTS_MAX or sum(map(body.count, (b",", b":", b"["))) > PARTS_MAX:
        raise ValueError("too many parts")
    return json.loads(body, object_pairs_hook=_Pairs)


def _is_plain(body: bytes) -> bool:
    try:
        found = _pairs_in(body)
    except mcp_codec.UNREADABLE:
        return False
    messages = found if isinstance(found, list) else [found]
    return all(isinstance(message, _Pairs) and _says_once(message) for message in messages)


def _says_once(message: _Pairs) -> bool:
    params = [value for name, value in message if name == "params" and isinstance(value, _Pairs)]
    return all(_names_once(part) for part in (message, *params))


def _names_once(pairs: _Pairs) -> bool:
    names = [name for name, _ in pairs if name.casefold() in _WORDS]
    return len(set(names)) == len(names) and all(name in _WORDS for name in names)


def tools_in(body: bytes) -> tuple[str, ...] | None:
    """Return the tools that any server may find called in a message; None if it cannot be read."""
    try:
        found = _pairs_in(body)
    except mcp_codec.UNREADABLE:
        return None
    messages = [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, _Pairs)]
    return tuple(tool for message in messages if "tools/call" in _all(message, "method") for tool in _named(message))


def _named(message: _Pairs) -> set[str]:
    params = [each for each in _all(message, "params") if isinstance(each, _Pairs)]
    return {str(name) for each in params for name in _all(each, "name")} or {""}


def _all(pairs: _Pairs, word: str) -> list[Any]:
    return [value for name, value in pairs if name.casefold() == word]


def narrowed(payload: bytes, keep: Keep) -> bytes:
    """Return a message, or a batch, with the tools left out that are not to be kept; all else as it is."""
    try:
        if payload.lstrip()[:1] == b"[":
            return b"[%b]" % b",".join(narrowed(bytes(each), keep) for each in _decode_list(payload))
        message = mcp_codec.decode_fields(payload)
        result = mcp_codec.decode_fields(message["result"])
        tools = _decode_list(result["tools"])
        result["tools"] = Raw(mcp_codec.encode([tool for tool in tools if keep(_decode_tool(tool).name)]))
    except (*mcp_codec.UNREADABLE, KeyError):
        return payload
    if "cacheScope" in result:
        result["cacheScope"] = Raw(b'"private"')  # others may use other tools
    message["result"] = Raw(mcp_codec.encode(result))
    return mcp_codec.encode(message)


class BoundHead:
    """Shows the head of an answer to who edits it, and then edits lists of tools in its body."""

    def __init__(self, inner: Any, keep: Keep) -> None:
        self._inner: HeadEditor | None = inner
        self._keep = keep

    def edit_head(self, status: int, fields: HeaderList, pin: Pin) -> tuple[HeaderList, AnswerEditor | None]:
        """Return the fields for the client and who edits the body."""
        first = None
        if self._inner is not None:
            fields, first = self._inner.edit_head(status, fields, pin)
        return fields, ToolLists(self._keep, first)


class ToolLists:
    """Takes tools out of the lists in an answer, behind another editor if there is one."""

    edits_json = True

    def __init__(self, keep: Keep, first: AnswerEditor | None = None) -> None:
        self._keep = keep
        self._first = first
        self._held = b""  # of a JSON answer
        self._cutter = EventCutter()
        self._is_json: bool | None = None  # until the first byte has come
        self._is_dropping = False

    def edit(self, data: bytes, is_last: bool) -> bytes:
        """Return what may be sent now: whole events, or all of a JSON answer at its end."""
        if self._first is not None:
            data = self._first.edit(data, is_last)
        if self._is_json is None and data.strip():
            self._is_json = data.lstrip()[:1] in b"{["
        return self._whole(data, is_last) if self._is_json else b"".join(self._events(data, is_last))

    def _whole(self, data: bytes, is_last: bool) -> bytes:
        self._held += data
        if len(self._held) > HELD_BYTES_MAX:
            self._held, self._is_dropping = b"", True
        if not is_last:
            return b""
        return b"" if self._is_dropping else narrowed(self._held, self._keep)

    def _events(self, data: bytes, is_last: bool) -> Iterator[bytes]:
        cutter = self._cutter
        yield from map(self._edited, cutter.feed(data))
        if is_last:
            yield self._edited(cutter.spill())
        elif cutter.held_bytes > HELD_BYTES_MAX:
            cutter.spill()
            self._is_dropping = True

    def _edited(self, event: bytes) -> bytes:
        is_dropped, self._is_dropping = self._is_dropping, False
        if is_dropped or b'"tools"' not in event:
            return b"" if is_dropped else event
        return with_data(event, lambda payload: narrowed(payload, self._keep))


_: list[type[AnswerEditor]] = [ToolLists]
