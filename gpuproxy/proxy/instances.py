"""Rented machines as upstreams: which a caller has, and where a port inside one of them is reached.

    /api/v1/gpu/proxy/instances/{contract_id}/{port}/...        by the contract
    target_url = http://{ip of the machine}:{port inside}/...   in an envelope, by the address

A worker asks control which machines a user has, once for all of them, and remembers it for a moment: what it knows is
served while it asks again, and forgotten at once when control says that it has changed. An address a provider has told
is no more to be trusted than one a caller writes, so what comes out of here passes the guard like any other target.
"""

from collections.abc import Callable, Iterable

from gpuproxy.errors import GatewayError
from gpuproxy.guard import Target
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import Machine

FRESH_S = 15.0
USABLE_S = 300.0  # while control is away; the address may belong to somebody else by then
USERS_MAX = 10_000
PREFIX = b"/instances/"
HTTPS_PORT = 443

Waiter = Callable[["Rented | GatewayError"], None]


class Rented:
    """The machines of one user, with the times until which that is fresh and usable at all."""

    __slots__ = ("_by_contract", "_by_host", "fresh_until_s", "usable_until_s")

    def __init__(self, machines: Iterable[Machine], now_s: float) -> None:
        self._by_contract = {machine.contract_id: machine for machine in machines}
        self._by_host: dict[str, list[Machine]] = {}
        for machine in self._by_contract.values():
            self._by_host.setdefault(machine.host.lower(), []).append(machine)
        self.fresh_until_s = now_s + FRESH_S
        self.usable_until_s = now_s + USABLE_S

    def outside(self, target: Target) -> Target:
        """Return where a port inside the user's machine at this address is mapped to; else the target as it is.

        Several machines may share an address; the first that has the port is meant.
        """
        for machine in self._by_host.get(target.host, ()):
            if target.port in machine.ports:
                mapped = _reached(machine.host, machine.ports[target.port])
                authority = mapped.authority if mapped.scheme == "https" else target.authority
                return mapped._replace(authority=authority, path=target.path)
        return target

    def at(self, contract_id: str, port: int) -> Target:
        """Return where a port of a machine is reached. Raises GatewayError NOT_FOUND, naming the ports there are."""
        machine = self._by_contract.get(contract_id)
        if machine is None:
            raise GatewayError("NOT_FOUND", f"no instance {contract_id[:100]!r} of this account runs")
        if port not in machine.ports:
            known = ", ".join(map(str, sorted(machine.ports))) or "none"
            raise GatewayError("NOT_FOUND", f"instance {contract_id} has no port {port}; it has: {known}")
        return _reached(machine.host, machine.ports[port])


class Instances:
    """What this worker knows of its callers' machines."""

    def __init__(self, link: LinkClient, now: Callable[[], float]) -> None:
        self._link = link
        self._now = now
        self._known: dict[str, Rented] = {}
        self._waiting: dict[str, list[Waiter]] = {}
        self._outdated: set[str] = set()  # asked about when the word came that it has changed

    def find(self, user_id: str, waiter: Waiter) -> Rented | None:
        """Return what is known of a user's machines, or None and call `waiter` later."""
        rented = self._known.get(user_id)
        now_s = self._now()
        if rented is not None and now_s < rented.usable_until_s:
            if now_s >= rented.fresh_until_s and user_id not in self._waiting:
                rented.fresh_until_s = now_s + 1  # at most one question a second
                self._ask(user_id, [])
            return rented
        if user_id in self._waiting:
            self._waiting[user_id].append(waiter)
        else:
            self._ask(user_id, [waiter])
        return None

    def forget(self, user_ids: Iterable[str]) -> None:
        """Forget these users' machines; an answer that is on its way may be older than that."""
        for user_id in user_ids:
            self._known.pop(user_id, None)
            if user_id in self._waiting:
                self._outdated.add(user_id)

    def forget_all(self) -> None:
        """Forget everything: words may have been missed while the link was away."""
        self._known.clear()

    def _ask(self, user_id: str, waiters: list[Waiter]) -> None:
        self._waiting[user_id] = waiters
        self._link.ask_machines(user_id, lambda machines: self._answered(user_id, machines))

    def _answered(self, user_id: str, machines: tuple[Machine, ...] | None) -> None:
        waiters = self._waiting.pop(user_id, [])
        if user_id in self._outdated:
            self._outdated.discard(user_id)
            self._ask(user_id, waiters)
            return
        if machines is not None:
            self._hold(user_id, machines)
        for waiter in waiters:
            waiter(self._known.get(user_id) or GatewayError("UNAVAILABLE", "rentals cannot be looked up; try again", 1))

    def _hold(self, user_id: str, machines: tuple[Machine, ...]) -> None:
        if len(self._known) >= USERS_MAX:
            del self._known[next(iter(self._known))]
        self._known[user_id] = Rented(machines, self._now())


def _reached(host: str, port: int) -> Target:
    """Return the target; a provider that puts TLS before its machines does so at the port of https."""
    if port == HTTPS_PORT:
        return Target("https", host, port, host, "")
    return Target("http", host, port, f"{host}:{port}", "")


def split_target(rest: bytes) -> tuple[str, int, bytes]:
    """Split ``/instances/{contract_id}/{port}/path?query``. Raises GatewayError NOT_FOUND."""
    contract_id, _, after = rest[len(PREFIX) :].partition(b"/")
    digits = after.partition(b"?")[0].partition(b"/")[0]
    if not contract_id or not digits.isdigit() or not 1 <= int(digits[:6]) <= 65_535:
        raise GatewayError("NOT_FOUND", "write /instances/{contract_id}/{port}/..., with a port inside the instance")
    return contract_id.decode("latin-1"), int(digits), after[len(digits) :] or b"/"
