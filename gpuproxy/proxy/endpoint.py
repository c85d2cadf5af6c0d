"""One base URL of an upstream, as one model (or the upstream by its own name) sees it."""

from typing import TYPE_CHECKING

from gpuproxy.proxy.breaker import Replica

if TYPE_CHECKING:
    from gpuproxy.proxy.balance import Level
    from gpuproxy.proxy.destination import Destination
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.rooms import Room


class Endpoint:
    """Where a call can be sent, and on which terms.

    ``fixed_fields`` are the header lines every request to it carries but Host, ``fixed_names`` their names in lower
    case. ``model`` is the model's name there, empty to leave it. Times are in seconds. Those that callers name by
    address have no replica: nothing is remembered of them.
    """

    __slots__ = (
        "base_path",
        "connect_s",
        "destination",
        "first_byte_s",
        "fixed_fields",
        "fixed_names",
        "host",
        "idle_s",
        "is_hurried",
        "is_listed",
        "level",
        "may_ask_usage",
        "model",
        "origin",
        "preserves_host",
        "priority",
        "replica",
        "room",
        "step",
        "upstream",
        "weight",
    )

    destination: "Destination | None"
    level: "Level"

    def __init__(
        self, origin: "Origin", host: bytes, first_byte_s: float, idle_s: float, replica: Replica | None = None
    ) -> None:
        self.origin = origin
        self.host = host
        self.first_byte_s = first_byte_s  # for the answer's first byte
        self.idle_s = idle_s
        self.replica = replica
        self.connect_s: float | None = None
        self.base_path = b""
        self.fixed_fields = b""
        self.fixed_names: frozenset[bytes] = frozenset()
        self.preserves_host = False
        self.may_ask_usage = False
        self.upstream = ""
        self.model = ""
        self.priority = 0
        self.weight = 1
        self.room: Room | None = None  # for calls at once; None: no bound
        self.destination = None
        self.is_hurried = False  # the caller waits less than is usual here: what comes late is no failure
        self.is_listed = False  # whether its level may choose it
        self.step = 1.0  # what one call weighs: the more, the fewer it gets

    @property
    def has_room(self) -> bool:
        """Tell whether it is below its limit of calls."""
        return self.room is None or self.room.spare > 0

    @property
    def title(self) -> tuple[str, str]:
        """Return what its model is called here and there."""
        return (self.destination.model if self.destination is not None else ""), self.model

    def refresh(self) -> None:
        """List it or not, as breaker, limit and rest say now."""
        replica = self.replica
        assert replica is not None  # only those with a replica belong to a level
        is_listed = replica.admits and self.has_room and self not in replica.resting
        if is_listed == self.is_listed:
            return
        self.is_listed = is_listed
        if is_listed:
            self.level.add(self)
            self.wake()
        else:
            self.level.remove(self)

    def wake(self) -> None:
        """Let calls that wait look at it: there is room, or it is listed again."""
        destination = self.destination
        if destination is not None:
            destination.serve_waiting()
            for other in destination.stands_in_for:
                other.serve_waiting()

    def weigh(self) -> None:
        """Take weight and share into account."""
        assert self.replica is not None
        self.step = 1.0 / (self.weight * self.replica.share)
        self.level.weighed(self)

    def at_root(self, first_byte_s: float | None) -> "Endpoint":
        """Return the same place without its base path: what an envelope's target names."""
        copy = Endpoint(self.origin, self.host, first_byte_s or self.first_byte_s, self.idle_s, self.replica)
        copy.is_hurried = copy.first_byte_s < self.first_byte_s
        copy.fixed_fields = self.fixed_fields
        lines = self.fixed_fields.split(b"\r\n")
        copy.fixed_names = frozenset(line.partition(b":")[0].lower() for line in lines if line)  # it may name any
        copy.preserves_host, copy.connect_s = self.preserves_host, self.connect_s
        copy.may_ask_usage = self.may_ask_usage
        copy.upstream = self.upstream
        return copy

    def whole(self) -> "Endpoint":
        """Return the same endpoint for paths that are not below its base path."""
        copy = self.at_root(None)
        copy.destination = self.destination
        return copy
