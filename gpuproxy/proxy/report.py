"""Tells control how this worker's endpoints and queues are, for admins: what has changed, and now and then all."""

from collections.abc import Callable, Mapping

from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import EndpointState, States
from gpuproxy.proxy.breaker import STATES, Replica, Replicas
from gpuproxy.proxy.destination import Destination

REPEATED = 10  # sweeps after which all is told again
ENDPOINTS_MAX = 4_000  # in one message: about half of what a frame of the link holds


class Reporter:
    """Remembers what was told last. ``models()`` returns the models in force, by every name of theirs."""

    def __init__(self, replicas: Replicas, link: LinkClient, models: Callable[[], Mapping[str, Destination]]) -> None:
        self._replicas = replicas
        self._link = link
        self._models = models
        self._told = States(())
        self._sweep_count = 0

    def sweep(self) -> None:
        """Tell what has changed; called about twice a second."""
        if not self._link.connected.is_set():
            return
        self._sweep_count += 1
        endpoints = tuple(_state(replica) for replica in list(self._replicas.all())[:ENDPOINTS_MAX])
        named = self._models().items()
        waiting = tuple((name, len(at.waiting)) for name, at in named if at.waiting and name == at.model)
        states = States(endpoints, waiting)
        if states != self._told or self._sweep_count % REPEATED == 0:  # a new control knows nothing
            self._told = states
            self._link.send(states)


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
