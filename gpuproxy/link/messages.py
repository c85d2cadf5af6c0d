"""What worker and control say to each other over the link: length-prefixed MessagePack.

A frame is a 4-byte big-endian length and one message. Control answers `Authorize` with `Authorized` of the
same ``id``; `Revoke`, `Renew` and `Prices` are pushed. Both ends are of one version (one supervisor starts both), so
unknown messages are a fault.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec
from msgspec import Struct

from gpuproxy.config import Model, Upstream
from gpuproxy.pricing import Price
from gpuproxy.types import Grant

LeaseKind = Literal["requests", "tokens", "streams", "nanousd"]
TOKENS = "tokens:"  # stands before the key id, or nothing, where control names a limit of tokens
STREAMS = "streams:"  # the same for streams
HELD_AT_ONCE = 5_000  # in one message: 450 KB

FRAME_BYTES_MAX = 1 << 20  # a Grant is under 10 KiB; anything near this is a broken stream


class Hello(Struct, tag="hello", frozen=True):
    """First message of a worker: which slot it fills, its process id, and the name of its journal.

    The name is no other worker's, ever; leases belong to it. A worker without one gets none.
    """

    slot: int
    pid: int
    epoch: str = ""


class Authorize(Struct, tag="authorize", frozen=True):
    """Ask what the key with this SHA-256 digest (32 bytes) may do."""

    id: int
    digest: bytes


class Authorized(Struct, tag="authorized", frozen=True):
    """Answer to Authorize. ``grant`` is None for a key that is unknown, expired, revoked or of a blocked user."""

    id: int
    digest: bytes
    grant: Grant | None


class Unavailable(Struct, tag="unavailable", frozen=True):
    """Answer to a question when the store cannot be asked now; says nothing about the key."""

    id: int


class Revoke(Struct, tag="revoke", frozen=True):
    """Pushed: forget these keys at once."""

    key_ids: tuple[str, ...]


class Renew(Struct, tag="renew", frozen=True):
    """Pushed: ask about these keys again, on other terms than before they may do the same."""

    key_ids: tuple[str, ...]


class Prices(Struct, tag="prices", frozen=True):
    """Pushed at connect, before any other message, and on change: all prices, in as many messages as they need."""

    prices: tuple[Price, ...]
    is_first: bool = True
    is_last: bool = True


class Routing(Struct, tag="routing", frozen=True):
    """Pushed at connect and on change: the upstreams and models in force, all of them."""

    upstreams: tuple[Upstream, ...]
    models: tuple[Model, ...]


class SealKeys(Struct, tag="seal_keys", frozen=True):
    """Pushed at connect, before any other message: the keys that seal what clients keep for us, newest first."""

    keys: tuple[bytes, ...]


class EndpointState(Struct, array_like=True, frozen=True):
    """How one endpoint has done in one worker since that started; counts are of calls.

    ``state`` is its breaker's: closed, open or half_open. ``opened_count`` tells how often it was left alone,
    ``first_byte_us`` the average time to the first byte where a strategy goes by it, else 0.
    """

    upstream: str
    url: str
    state: str
    open_count: int
    call_count: int
    failed_count: int
    opened_count: int
    first_byte_us: int
    worker: int = -1


class States(Struct, tag="states", frozen=True):
    """Told by a worker now and then, if anything has changed: the state of its endpoints, and how many calls wait for
    room, by their model where there are any.
    """

    endpoints: tuple[EndpointState, ...]
    waiting: tuple[tuple[str, int], ...] = ()


class Lease(Struct, tag="lease", frozen=True):
    """Ask for a part of what is left: ``least`` for a call that waits (0: none does), ``wanted`` to go on with.

    Requests, tokens and streams count against the limit of the key, or of the user if ``key_id`` is empty; streams
    until they are given back. Nanodollars always come from the user's credit, and with ``key_id`` are for the keys that
    share a budget under that id. ``limit`` raises the limit for this question, for a key that may.
    """

    id: int
    user_id: str
    key_id: str
    kind: LeaseKind
    least: int
    wanted: int
    limit: int = 0


class Leased(Struct, tag="leased", frozen=True):
    """Answer to Lease: ``amount`` is 0, or at least what was needed. Spend it before ``until_ns`` (0: no end).

    For requests and tokens also the limit per minute (0: none; then the amount is as wanted), what is left of it, and
    when something comes back if nothing is. Times are monotonic nanoseconds, which all processes of a machine share;
    but ``budget_ends_ns`` is unix time: the end of the window of the budget that refused nanodollars, 0 for none.
    """

    id: int
    amount: int
    until_ns: int = 0
    limit: int = 0
    remaining: int = 0
    reset_ns: int = 0
    budget_ends_ns: int = 0


class Return(Struct, tag="return", frozen=True):
    """Give back what was not spent of the lease with this id (0: of any); ``recall_id`` answers a Recall."""

    user_id: str
    key_id: str
    kind: LeaseKind
    amount: int
    lease_id: int = 0
    recall_id: int = 0


class HeldStreams(Struct, tag="held_streams", frozen=True):
    """Told by a worker whenever it is linked, before it asks: all streams it holds, as user id, key id and count.

    ``is_first`` of the messages it takes ends what was known before.
    """

    held: tuple[tuple[str, str, int], ...]
    is_first: bool = True


class HeldCredit(Struct, tag="held_credit", frozen=True):
    """Told by a worker whenever it is linked, before it asks: of whom it has credit, as user and key id of the leases.

    The messages it takes go from ``is_first`` to ``is_last``.
    """

    held: tuple[tuple[str, str], ...]
    is_first: bool = True
    is_last: bool = True


class Recall(Struct, tag="recall", frozen=True):
    """Pushed: return at once what is not in use, even if that is 0; somebody else needs it."""

    id: int
    user_id: str
    key_id: str
    kind: LeaseKind


class BreakerMove(Struct, tag="breaker_move", frozen=True):
    """Told by a worker, and passed on to the others: what it has found out about an endpoint.

    It is left alone ``for_s`` (``step_s``: what is doubled when the next try fails), a call tries it, it is back, or
    the call that tried it was abandoned. Or it rests ``for_s``, for one ``model`` as it is called here and there.
    """

    upstream: str
    url: str
    what: Literal["opened", "trying", "closed", "abandoned", "resting"]
    for_s: float = 0.0
    step_s: float = 0.0
    model: tuple[str, str] = ("", "")


SeatPlace = tuple[str, str, int]  # upstream, base URL, and how many calls that may have at once


class HoldSeats(Struct, tag="hold_seats", frozen=True):
    """Told by a worker whenever it is linked, and when it begins to keep to a limit: so many seats it holds in all."""

    place: SeatPlace
    count: int


class WantSeats(Struct, tag="want_seats", frozen=True):
    """Ask for seats; it is urgent if calls wait for them."""

    place: SeatPlace
    count: int
    is_urgent: bool


class GiveSeats(Struct, tag="give_seats", frozen=True):
    """Give so many back."""

    place: SeatPlace
    count: int


class Seats(Struct, tag="seats", frozen=True):
    """Pushed: have so many more."""

    place: SeatPlace
    count: int


class FreeSeats(Struct, tag="free_seats", frozen=True):
    """Pushed: give back what is not in use: once, or also whatever becomes free later, or that no more."""

    place: SeatPlace
    when: Literal["once", "always", "no more"]


class Machine(Struct, array_like=True, frozen=True):
    """A rented machine that runs: where it is reached, its ports inside with those outside they are mapped to."""

    contract_id: str
    host: str
    ports: dict[int, int]


class AskMachines(Struct, tag="ask_machines", frozen=True):
    """Ask which rented machines a user has running."""

    id: int
    user_id: str


class Machines(Struct, tag="machines", frozen=True):
    """Answer to AskMachines."""

    id: int
    user_id: str
    machines: tuple[Machine, ...]


class ForgetMachines(Struct, tag="forget_machines", frozen=True):
    """Pushed: what is known of these users' machines is out of date."""

    user_ids: tuple[str, ...]


Told = Return | States | HeldStreams | HeldCredit | HoldSeats | WantSeats | GiveSeats | BreakerMove
FromWorker = Hello | Authorize | Lease | AskMachines | Told
FromControl = (
    Authorized
    | Unavailable
    | Revoke
    | Renew
    | Prices
    | Leased
    | Recall
    | Machines
    | ForgetMachines
    | Routing
    | SealKeys
    | Seats
    | FreeSeats
    | BreakerMove
)

_encoder = msgspec.msgpack.Encoder()
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_from_control = msgspec.msgpack.Decoder(FromControl).decode


def frame(message: FromWorker | FromControl) -> bytes:
    """Return the message as one frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


class FrameReader:
    """Cuts a byte stream into frame bodies; raises ValueError on a frame over FRAME_BYTES_MAX."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the body of every frame that `data` completes."""
        held = self._held + data
        start = 0
        while len(held) - start >= 4:
            size = int.from_bytes(held[start : start + 4], "big")
            if size > FRAME_BYTES_MAX:
                raise ValueError(f"link frame of {size} bytes is over the limit of {FRAME_BYTES_MAX}")
            if len(held) - start - 4 < size:
                break
            yield held[start + 4 : start + 4 + size]
            start += 4 + size
        self._held = held[start:]
