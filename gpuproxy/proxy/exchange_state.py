"""What an exchange knows and in which states it can be; its parts, the classes above it, are one idea each.

    ExchangeState -> Settled -> Refusing -> Answer -> Tunnelled -> Attempts -> Sending -> Paying -> Exchange

From left to right the way back to the client, then the way there. Methods a part calls of those further right stand
here without a body.
"""

from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError
from gpuproxy.plugin import AnswerEditor, Call, Intent, ProtocolHandler, UpstreamRequest, UsageReader
from gpuproxy.proxy import envelope as envelopes
from gpuproxy.proxy.credit import Bill
from gpuproxy.proxy.headers import Field
from gpuproxy.proxy.heads import AnswerHead, RequestHead
from gpuproxy.proxy.limits import Purse, Slots
from gpuproxy.proxy.route import Route
from gpuproxy.types import Grant

if TYPE_CHECKING:
    from gpuproxy.proxy.breaker import Replica
    from gpuproxy.proxy.destination import Destination
    from gpuproxy.proxy.downstream import Downstream
    from gpuproxy.proxy.endpoint import Endpoint
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.upstream import UpstreamConnection
    from gpuproxy.proxy.worker import Plane

# States, in the order they are passed through.
NEW, ADMITTING, COLLECTING, WAITING, CONNECTING, SENT, DONE = range(7)

# Reasons not to read from the client for now; reading goes on when none is left.
READ_UPLOAD, READ_QUEUE, READ_BUFFER, READ_ANSWERS = 1, 2, 4, 8

DISCARDED_BODY_BYTES_MAX = 262_144  # of a refused upload that is read to keep the connection usable
PSEUDONYM = b"gpuproxy"
VIA_HOPS_MAX = 2  # how often a request may pass this gateway before it is a loop
JOINED_BYTES_MAX = 16_384  # a body up to this is copied behind its head for one write; above, two writes are cheaper

NEVER_BYTES = 1 << 62
CHECKPOINT_NS = 5_000_000_000  # a call that lasts notes so often what it has used
TIME_AHEAD_US = 2_000_000  # a few sweeps: time is reserved that early before it is used up

ATTEMPTS = b"X-Gpuproxy-Attempts: %d\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ExchangeState:
    """All that is known of one request and its answer."""

    __slots__ = (
        "_asked",
        "_attempt_ns",
        "_attempts",
        "_bill",
        "_call",
        "_checkpoint_ns",
        "_collected",
        "_destination",
        "_editor",
        "_endpoint",
        "_error",
        "_first_byte_ns",
        "_generation",
        "_grant",
        "_handler",
        "_head",
        "_idle_s",
        "_intent",
        "_is_answer_chunked",
        "_is_answer_until_close",
        "_is_body_whole",
        "_is_paused",
        "_look_at_bytes",
        "_needs_body",
        "_origin",
        "_patience_s",
        "_purse",
        "_reader",
        "_receipt_id",
        "_response_bytes",
        "_sending",
        "_slots",
        "_started_ns",
        "_status",
        "_tokens",
        "_tried",
        "_unpaid",
        "_wall_offset_ns",
        "content_length",
        "downstream",
        "has_body",
        "has_sent_head",
        "head",
        "held_body",
        "is_received",
        "keeps_alive",
        "method",
        "plane",
        "request_bytes",
        "request_id",
        "route",
        "sent_method",
        "state",
        "upstream",
    )

    route: Route
    _started_ns: int
    _unpaid: "tuple[Intent, bytes | None, Endpoint | None, int]"
    _sending: tuple[bytes, bytes, list[Field], bytes | None, UpstreamRequest]
    _tried: list["Replica"]  # where the call has failed; unset as long as it has not
    _asked: str  # the model's name as the caller wrote it

    def __init__(self, plane: "Plane", downstream: "Downstream", head: RequestHead, content_length: int) -> None:
        self.plane = plane
        self.downstream = downstream
        self.head = head
        self.method = self.sent_method = head.method
        self.keeps_alive = head.keeps_alive
        self.request_id = head.request_id
        self.content_length = content_length  # of the request's body, -1 if not told
        self.has_body = content_length > 0 or head.is_chunked
        self.state = NEW
        # the upload
        self.is_received = self._needs_body = self._is_body_whole = False
        self.request_bytes = 0
        self.held_body: list[bytes] = []
        # the way
        self.upstream: UpstreamConnection | None = None
        self._grant: Grant | None = None
        self._purse: Purse | None = None
        self._handler: ProtocolHandler | None = None
        self._call: Call | None = None
        self._intent: Intent | None = None
        self._destination: Destination | None = None
        self._endpoint: Endpoint | None = None
        self._attempt_ns = 0  # when an attempt began whose time is wanted
        self._generation = -1  # of the endpoint's breaker; -1: no attempt is under way there
        self._origin: Origin | None = None
        self._head = b""
        self._attempts = 0
        self._patience_s = 0.0  # for the answer's first byte
        # the answer
        self.has_sent_head = self._is_answer_chunked = self._is_answer_until_close = self._is_paused = False
        self._reader: UsageReader | None = None
        self._editor: AnswerEditor | None = None  # until the head has come it may be a HeadEditor
        self._collected: envelopes.Collected | None = None
        self._status = self._response_bytes = self._first_byte_ns = 0
        self._idle_s = 0.0
        self._error = ""
        # what it costs
        self._tokens: tuple[Purse, int, int] | None = None  # counted: by whom, how many, of which lease
        self._slots: Slots | None = None  # where it has one
        self._bill: Bill | None = None
        self._receipt_id = ""  # made early for checkpoints
        self._wall_offset_ns = 0  # kept for them: a receipt is known by its id and start
        self._checkpoint_ns = 0
        self._look_at_bytes = NEVER_BYTES

    def _connect_to(self, origin: "Origin") -> None:
        raise NotImplementedError  # the way there: `Exchange`

    def _goes_elsewhere(
        self, reason: str, connection: "UpstreamConnection | None" = None, has_failed: bool = True
    ) -> bool:
        raise NotImplementedError

    def _is_kept_back(self, connection: "UpstreamConnection", body: bytes) -> bool:
        raise NotImplementedError

    def _goes_on(self, connection: "UpstreamConnection", following: UpstreamRequest) -> None:
        raise NotImplementedError

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error in the caller's dialect; mid-answer, cut the stream visibly instead."""
        raise NotImplementedError


class _NoPlace:
    upstream = ""


NO_PLACE = _NoPlace()
NO_GRANT = Grant("", "")
NO_HEAD = AnswerHead()
NO_INTENT = Intent()
