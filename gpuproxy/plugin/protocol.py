"""What a protocol handler is and what it sees of a call."""

from typing import Any, Protocol, runtime_checkable

from msgspec import Struct

from gpuproxy.errors import GatewayError
from gpuproxy.plugin.sessions import HeadEditor, Pin
from gpuproxy.types import Usage

HeaderList = list[tuple[bytes, bytes]]


class Call(Struct, gc=False):
    """One call as a handler sees it.

    ``path`` is what follows the gateway's own prefix, in origin form with its query and byte-exact
    (``/v1/chat/completions?x=1``, ``/mcp/tools``); for an envelope or ``/upstreams/{name}`` call it is the
    target's own path, empty when the target URL has none. ``headers`` are the client's end-to-end fields in
    order, names as sent. ``body`` is the whole body, or None while (or because) it is streamed.
    ``body_bytes`` is its size also when it is not kept any more. ``is_envelope`` tells that the answer will be wrapped
    in JSON. ``note`` is the handler's own: what it wants to know again when it is asked for a reader or to collapse.

    ``tools`` are the rules a key is bound to (see `may_use`), None for most; then ``upstream`` is whose tools the call
    would use. Only a handler with a true ``binds_tools`` is shown such a call of an upstream of its own.
    """

    method: bytes
    path: bytes
    headers: HeaderList
    body: bytes | None = None
    is_envelope: bool = False
    body_bytes: int = 0
    may_ask_usage: bool = False
    note: Any = None
    tools: tuple[str, ...] | None = None
    upstream: str = ""

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of the field `name` (lower case), or None."""
        for field, value in self.headers:
            if field.lower() == name:
                return value
        return None


class Intent(Struct, gc=False):
    """Where a call wants to go: by model, or by the name of an upstream; and what is worth metering.

    ``path`` replaces the call's path and query below the upstream's base URL; None keeps them, and one that is
    empty or begins with ``?`` means the base URL's own path. ``max_output_tokens`` is what the caller bounds each
    answer to, 0 if nothing does; ``choice_count`` how many answers they ask for. Both bound what the call may cost.
    ``note`` is the handler's own, for `prepare`. ``pin`` is the one server the call may go to; see `sessions`.

    ``rpc_method`` and ``rpc_name`` tell the receipt what a JSON-RPC call asks for; ``tools`` are those it has do their
    work, which may have prices. ``is_deferred`` tells that the answer will not tell what was used: the work is done
    later, and its result fetched by another call. ``input_tokens_max`` is the most tokens the body can make, 0 for as
    many as it has bytes. ``is_upload`` tells that the call brings a file, and uses no model.
    """

    model: str = ""
    upstream: str = ""
    path: bytes | None = None
    is_stream: bool = False
    note: Any = None
    max_output_tokens: int = 0
    choice_count: int = 1
    pin: Pin | None = None
    rpc_method: str = ""
    rpc_name: str = ""
    tools: tuple[str, ...] = ()
    is_deferred: bool = False
    input_tokens_max: int = 0
    is_upload: bool = False


class AnswerEditor(Protocol):
    """Changes a streamed answer on its way to the client. Made for one call.

    That of a request with `asks_usage` may have a method ``was_refused(body) -> bool`` that tells of the body of an
    answer 400 or 422 whether it was the question that the upstream refused. The call is then sent once more without.
    """

    def edit(self, data: bytes, is_last: bool) -> bytes:
        """Return what of the body so far may be sent now; all that is left when `is_last`."""


class UpstreamRequest(Struct, gc=False):
    """What to send upstream instead of what the client sent; the defaults change nothing.

    ``path`` replaces the target (origin form, below no base path), ``body`` the body. ``headers`` replace the client's
    fields of the same name; an empty value takes them out. ``identity`` asks the upstream for an uncompressed answer so
    that usage can be read. ``editor`` is shown a streamed answer of status 200 before the client is (and one in JSON,
    if it has a true ``edits_json``); one that is a `HeadEditor` is shown the head of any answer instead. ``asks_usage``
    tells that ``body`` and ``editor`` are there for usage alone: upstreams not to be asked get what the client sent.
    ``sequel`` is asked about the whole answer of an envelope.
    """

    path: bytes | None = None
    body: bytes | None = None
    headers: HeaderList = []
    identity: bool = False
    editor: AnswerEditor | HeadEditor | None = None
    asks_usage: bool = False
    sequel: "Sequel | None" = None


class Sequel(Protocol):
    """What follows an envelope's request when its answer is not for the caller. Made for one call.

    All that follows goes to the same server, by the same method and path, and is one call with one receipt. With a
    ``farewell`` the server gets, after the last answer, the head of the last request again by that method, without a
    body; its answer is not waited for.
    """

    farewell: bytes

    def next(self, status: int, fields: HeaderList, body: bytes) -> "UpstreamRequest | None":
        """Return the request that follows this answer, None if the answer is the caller's."""


class UsageReader(Protocol):
    """Reads usage from an answer's body as it passes. Sans-I/O, fed after the client was written to.

    The result must not depend on how the body was split. Counts are whole numbers, -1 if not known; a reader that fails
    or tells others has told nothing. A reader may have a property ``is_terminal`` that tells whether the answer's own
    end marker has passed: a client that leaves then has had everything; and one ``rpc_outcome`` that tells how a
    JSON-RPC call ended (see `Receipt`). Once finished it may have a ``response_model``: the model that the answer says
    it is of. It may have a method ``so_far() -> Usage`` that tells, at any time, what was delivered by then and never
    more than that: a stream without it is neither stopped when what it reserved is used up nor billed for its tokens
    when it breaks off.

    Of a WebSocket `feed` gets each text message of the upstream, whole, but for those over 1 MiB. The reader may have a
    property ``is_amid`` that tells whether an answer is under way, for limits of tokens are looked at between them; and
    a method ``check(message) -> str`` that tells why a message of the client must not pass, empty if it may: that ends
    the connection. ``weigh(message) -> int`` tells the most tokens that a message of the client can make, which are set
    aside; without it they are as many as its bytes.
    """

    def feed(self, data: bytes) -> None:
        """Look at the next bytes of the body (content, without transfer framing)."""

    def finish(self) -> Usage | None:
        """Return what was used, None if the answer told nothing. Called once, also for a cut answer."""


@runtime_checkable
class ProtocolHandler(Protocol):
    """Speaks one protocol. One instance serves all calls of a worker: keep no state of a call in it.

    ``name`` is what config and envelope call the protocol. ``mounts`` are first path segments it serves
    directly below the proxy prefix (``("v1", "v2")``), may be empty.
    """

    name: str
    mounts: tuple[str, ...]

    def needs_body(self, method: bytes, path: bytes) -> bool:
        """Tell whether `inspect` needs the whole body to find the destination."""

    def inspect(self, call: Call) -> Intent:
        """Read a call that came in by a mount and say where it goes. Raises GatewayError."""

    def prepare(self, call: Call, intent: Intent) -> UpstreamRequest:
        """Complete the request for the upstream. Raises GatewayError.

        For envelope and ``/upstreams/{name}`` calls `intent` comes from ``describe``.
        """

    def describe(self, call: Call) -> Intent:
        """Say what can be metered (model, stream) of a call whose destination is given already."""

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        """Return a reader for an answer with this status and content type (lower case), None to not look.

        For a WebSocket that opens they are 101 and ``websocket``; with `identity` it is not compressed.
        """

    def collapse(self, call: Call, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Turn a whole answer into what an envelope carries: (content type, body)."""

    def refuse(self, path: bytes, error: GatewayError, request_id: str) -> bytes:
        """Return the JSON body that tells a client of this protocol about `error`."""


@runtime_checkable
class BodySparer(Protocol):
    """What a handler may offer besides: to read from the head alone what `inspect` would read from the body."""

    def spares_body(self, fields: HeaderList) -> bool:
        """Tell whether a call with these fields, for which `needs_body` is true, can do without."""


@runtime_checkable
class ToolReader(Protocol):
    """What a handler may offer besides, whose calls have tools do work that can cost."""

    def tools_in(self, body: bytes) -> tuple[str, ...] | None:
        """Return the tools that any server may find called in a body; None if it cannot be read."""
