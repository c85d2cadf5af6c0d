"""The nouns every part of gpuproxy shares: grants, usage, receipts.

They cross process borders (link, journal) as MessagePack, so field order is part of the format:
append only, and give what is appended a default.
"""

from typing import Literal

from msgspec import Struct

ALL_SCOPES = ("inference", "account")  # call models; read and manage the own account

TOOL_CALL = "tools/call"  # the JSON-RPC method of MCP that has a tool do its work
CANCELLED = "cancelled"  # the outcome of a call whose client left while the tool was at work

Outcome = Literal["ok", "refused", "upstream_failed", "client_gone", "cut", "open"]
UsageSource = Literal["none", "provider", "estimated"]

RENTED = "(rented)"  # the upstream of calls to a machine of the caller's own; none of a configuration has this name

NOT_STORED = ("trace",)  # of a receipt: it is for who watches receipts go by


class Grant(Struct, array_like=True):
    """What a worker may know of one API key.

    ``models`` is None when every model is allowed, ``tools``, rules of `codec.tools`, when every tool is.
    ``expires_ns`` is unix time in nanoseconds, 0 for never. ``rpm`` and ``tpm`` are the limits of requests and tokens
    per minute, 0 for none; those that are shared count for all keys of the user. ``rpm_ceiling`` is how far a call may
    raise ``rpm``. ``streams`` is how many may be open at once. ``markup_bps``, in hundredths of a percent, is added to
    what its calls cost. ``budget_key`` names the keys that share a budget of their own; empty: it has none. ``revoked``
    is set in place by a push from control, so that whoever still holds the grant sees it.
    """

    key_id: str
    user_id: str
    scopes: tuple[str, ...] = ALL_SCOPES
    models: tuple[str, ...] | None = None
    expires_ns: int = 0
    revoked: bool = False
    rpm: int = 0
    is_rpm_shared: bool = False
    rpm_ceiling: int = 0
    tpm: int = 0
    is_tpm_shared: bool = False
    markup_bps: int = 0
    budget_key: str = ""
    streams: int = 0
    is_streams_shared: bool = False
    tools: tuple[str, ...] | None = None


class Usage(Struct, array_like=True, gc=False):
    """Tokens one call used. ``cached_tokens`` is the part of ``input_tokens`` served from a prompt cache."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    source: UsageSource = "provider"


class Attempt(Struct, array_like=True, frozen=True, gc=False):
    """One time a call was sent. ``began_us`` counts from the start of the call; ``error`` says why another followed."""

    began_us: int
    duration_us: int
    address: str
    port: int
    status: int = 0  # what the upstream answered, 0: nothing
    error: str = ""


class Trace(Struct, array_like=True, frozen=True, gc=False):
    """What becomes the spans of a call: its own id and its parent's, and each attempt, whose id is the next number.

    ``parent_id`` is empty for a call that began the trace. ``operation`` is what a model was asked for,
    ``response_model`` the one that the answer says it is of.
    """

    span_id: int
    parent_id: str
    operation: str
    attempts: list[Attempt]
    response_model: str = ""


class Receipt(Struct, array_like=True, frozen=True, gc=False):
    """One ended exchange, exactly one for each; the only thing a worker ever reports about a call.

    ``outcome`` "cut" is an answer the gateway broke off, since what the call may cost could not be reserved any more;
    "open" is a checkpoint, what a call has used so far, which stands in the journal only.

    ``id`` is unique over all workers and restarts. ``status`` is what the client was sent (0: nothing).
    ``first_byte_us`` counts from the request's last head byte to the upstream's first byte, -1 if none came.
    ``path`` carries no query. Token fields are -1 when the answer told no usage. ``markup_bps`` is what the worker
    reserved by; so it is charged by that, whatever holds when the receipt is stored.
    ``trace_id`` is empty while traces are off, ``trace`` None unless spans of this call are wanted.

    Of a JSON-RPC call ``rpc_method`` is the method ("batch" for several), ``rpc_name`` the tool, prompt or resource it
    names, ``rpc_outcome`` what the answer told: "ok", "tool_error", "input_required" or "jsonrpc_error:CODE"; all are
    empty if not known. Of a tool whose client left before its answer began ``rpc_outcome`` is "cancelled": it may have
    done its work.
    """

    id: str
    request_id: str
    started_ns: int
    duration_us: int
    first_byte_us: int
    user_id: str
    key_id: str
    protocol: str
    upstream: str
    model: str
    method: str
    path: str
    status: int
    outcome: Outcome
    error: str
    request_bytes: int
    response_bytes: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    usage_source: UsageSource
    attempts: int
    is_stream: bool
    markup_bps: int = 0
    rpc_method: str = ""
    rpc_name: str = ""
    rpc_outcome: str = ""
    trace_id: str = ""
    trace: Trace | None = None

    @property
    def tool(self) -> str:
        """Return the tool that was called, empty if none was."""
        return self.rpc_name if self.rpc_method == TOOL_CALL else ""
