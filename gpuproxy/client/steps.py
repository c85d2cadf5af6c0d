"""What each method of a client does, without I/O: steps that yield what is to be done next and take what came of it.

A `Call` is to be sent; what comes back is its decoded answer, or the opened stream, and its failure is thrown in. A
`Wait` is to be waited. Either client drives the same steps, one by blocking, the other by awaiting.
"""

import time
from collections.abc import Generator, Mapping
from itertools import count
from typing import Any, TypeVar

from msgspec import Struct

from gpuproxy.client.calls import Call, Listing, call_of, gpus_call, proxied, wait_before_retry
from gpuproxy.client.errors import GpuproxyError
from gpuproxy.client.instances import (
    in_doubt,
    instance_path,
    is_up,
    left_behind,
    not_in_time,
    progress,
    rental_of,
    rental_path,
)

Result = TypeVar("Result")


class Wait(Struct, frozen=True):
    """Time that has to pass before the next step."""

    seconds: float


Steps = Generator[Call | Wait, Any, Result]


class Planner:
    """Plans the steps of one client's methods; they raise GpuproxyError. See the clients for what they mean."""

    def __init__(self, timeout_s: float, retries: int) -> None:
        self._timeout_s = timeout_s
        self._retries = retries

    def call(self, method: str, path: str, body: Any = None, params: Mapping[str, Any] | None = None) -> Steps[Any]:
        """Make a call of the management API."""
        return self._repeated(call_of(method, path, body, params, self._timeout_s))

    def list_gpus(self, provider: str, min_vram: float | None, filters: Mapping[str, Any]) -> Steps[Listing]:
        """List what can be rented."""
        return Listing((yield from self._repeated(gpus_call(provider, min_vram, filters, self._timeout_s))))

    def create_instance(
        self, provider: str, instance_id: str, config: Mapping[str, Any], wait_s: float | None, poll_s: float
    ) -> Steps[dict[str, Any]]:
        """Rent an offer; with `wait_s` look every `poll_s` until it runs."""
        with in_doubt(provider, instance_id):
            rental = rental_of((yield from self.call("POST", instance_path(provider, instance_id), config)))
        if wait_s is None:
            return rental
        until = time.monotonic() + wait_s
        with left_behind(rental), progress(rental) as show:
            while not is_up(rental):
                if time.monotonic() >= until:
                    raise not_in_time(rental, wait_s)
                yield Wait(poll_s)
                rental = rental_of((yield from self.call("GET", rental_path(rental))))
                show(rental["status"])
        return rental

    def destroy_instance(self, provider: str, contract_id: str) -> Steps[Any]:
        """End a rented instance."""
        return self.call("DELETE", instance_path(provider, contract_id))

    def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None,
        headers: Mapping[str, str] | None,
        body: Any,
        stream: bool,
        timeout_s: float | None,
    ) -> Steps[Any]:
        """Send a call through the gateway. Raises ValueError for a body that asks for a stream nobody would read."""
        return self._repeated(proxied(protocol, target_url, method, headers, body, stream, timeout_s, self._timeout_s))

    def _repeated(self, call: Call) -> Steps[Any]:
        for done in count():
            try:
                return (yield call)
            except GpuproxyError as error:
                wait_s = wait_before_retry(call, error, done, self._retries)
                if wait_s is None:
                    raise
            yield Wait(wait_s)
        raise AssertionError  # the loop above has no end
