"""Active probes: each worker asks the ``probe_path`` of an upstream's endpoints now and then, by the pools calls use.

A probe goes through the same parser, TLS settings and bounds as a call. There is one at a time for each endpoint, and
it is over before the next is due. What it finds is told to the endpoint's breaker.
"""

import asyncio
from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.heads import AnswerHead, RequestHead
from gpuproxy.proxy.route import joined_path

if TYPE_CHECKING:
    from gpuproxy.proxy.upstream import UpstreamConnection
    from gpuproxy.proxy.worker import Plane


class Probe:
    """One question to an endpoint; takes the place of an exchange on its connection."""

    has_sent_head = False
    is_received = True
    sent_method = b"GET"

    def __init__(self, plane: "Plane", endpoint: Endpoint, path: bytes) -> None:
        self.plane = plane
        self.head = RequestHead(path)
        self.head.method = self.sent_method
        self._endpoint = endpoint
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def ask(self) -> bool:
        """Tell whether the endpoint answers with 2xx. Raises GatewayError when it cannot be connected to."""
        connection = await self._endpoint.origin.connect(self._endpoint.connect_s)
        connection.exchange = self
        connection.transport.write(
            b"GET %b HTTP/1.1\r\nHost: %b\r\n%bUser-Agent: gpuproxy-probe\r\n\r\n"
            % (
                joined_path(self._endpoint.base_path, self.head.target),
                self._endpoint.host,
                self._endpoint.fixed_fields,
            )
        )
        try:
            return 200 <= await self._status < 300
        finally:
            if connection.exchange is not None:  # it is out of time
                connection.abort()

    def relay(self, connection: "UpstreamConnection") -> None:
        """The head has come; whether the body is good nobody asks."""
        status = connection.head.status
        if connection.is_complete:
            connection.release(self.plane.now_s)
        else:
            connection.abort()
        self._end(status)

    def relay_interim(self, head: AnswerHead) -> None:
        """Wait on."""

    def switch_protocols(self, connection: "UpstreamConnection") -> None:
        """Never: nothing asks for it."""

    def upstream_lost(self, connection: "UpstreamConnection") -> None:
        """It closed."""
        self._end(0)

    def upstream_faulted(self, connection: "UpstreamConnection", reason: str) -> None:
        """What it sends is no answer."""
        connection.abort()
        self._end(0)

    def block_upload(self) -> None:
        """There is none."""

    def unblock_upload(self) -> None:
        """There is none."""

    def _end(self, status: int) -> None:
        if not self._status.done():
            self._status.set_result(status)


class Probes:
    """The endpoints to ask, and when they were asked last."""

    def __init__(self, plane: "Plane") -> None:
        self._plane = plane
        self._asked_s: dict[tuple[str, str], float] = {}
        self._running: set[tuple[str, str]] = set()

    def sweep(self, now_s: float) -> None:
        """Ask those whose time has come."""
        every_s = self._plane.replicas.config.probe_s
        probed = self._plane.router.probed
        if len(self._asked_s) > len(probed):  # some were taken out
            self._asked_s = {}
        for endpoint, path in probed:
            replica = endpoint.replica
            assert replica is not None
            place = replica.upstream, replica.url
            if place not in self._running and now_s - self._asked_s.get(place, float("-inf")) >= every_s:
                self._asked_s[place] = now_s
                self._running.add(place)
                self._plane.spawn(self._ask(endpoint, path, place))

    async def _ask(self, endpoint: Endpoint, path: bytes, place: tuple[str, str]) -> None:
        is_good = False
        try:
            async with asyncio.timeout(self._plane.replicas.config.probe_s):
                is_good = await Probe(self._plane, endpoint, path).ask()
        except (GatewayError, TimeoutError):
            pass
        finally:
            self._running.discard(place)
        assert endpoint.replica is not None
        endpoint.replica.probed(is_good)
