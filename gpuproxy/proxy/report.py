"""Tells control how this worker's endpoints are, so that an admin sees them: what has changed, and now and then all."""

from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import EndpointState, States
from gpuproxy.proxy.breaker import STATES, Replica, Replicas

REPEATED = 10  # sweeps after which all is told again
ENDPOINTS_MAX = 4_000  # in one message: about half of what a frame of the link holds


class Reporter:
    """Remembers what was told last."""

    def __init__(self, replicas: Replicas, link: LinkClient) -> None:
        self._replicas = replicas
        self._link = link
        self._told: tuple[EndpointState, ...] = ()
        self._sweep_count = 0

    def sweep(self) -> None:
        """Tell what has changed; called about twice a second."""
        if not self._link.connected.is_set():
            return
        self._sweep_count += 1
        states = tuple(_state(replica) for replica in list(self._replicas.all())[:ENDPOINTS_MAX])
        if states != self._told or self._sweep_count % REPEATED == 0:  # a new control knows nothing
            self._told = states
            self._link.send(States(states))


def _state(replica: Replica) -> EndpointState:
    return EndpointState(
        replica.upstream,
        replica.url,
        STATES[replica.state],
        replica.open_count,
        replica.begun_count,
        replica.failed_count,
        replica.opened_count,
        round(replica.ewma_us),
    )
