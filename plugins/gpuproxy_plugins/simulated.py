"""Provider "simulated": a small marketplace inside gpuproxy, to try everything without paying anybody.

Prices move, capacity runs out, instances boot, fail and are outbid. A rented instance runs nothing; if the block names
an address for a port, that server of yours stands behind the port of every instance:
``options = { 8000 = "127.0.0.1:9000" }``. Other options: ``seed`` (which market, default "1"), ``boot_s`` (default
"5"), ``failures`` (the share of instances that never come up, default "0"), ``file`` (where rentals are kept over a
restart; without it they end with the process).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from gpuproxy.plugin import (
    Basis,
    CapacityGone,
    ChargeKind,
    InstanceGone,
    InstanceSpec,
    Offer,
    OfferQuery,
    ProviderAdapter,
    ProviderCharge,
    ProviderInstance,
    ProviderSettings,
    ProviderUnavailable,
    Registry,
    SpecRefused,
    best_offers,
)
from gpuproxy_plugins.simulated_market import Machine, Market
from gpuproxy_plugins.simulated_options import read_options
from gpuproxy_plugins.simulated_rental import Rental, Step

NAME = "simulated"
SPOT = "-spot"  # marks the offer of a machine to the highest bidder
DISK_GB = 10  # what prices include, as the prices of vast.ai do; more disk costs more
KEPT_MAX = 1_000  # rentals that have ended, kept for `charges`


class Simulated:
    """A market of one's own. Each is its own world unless two share a ``file``."""

    name: str = NAME
    aliases: tuple[str, ...] = ("sim",)
    id_prefix: str = "sim"
    basis: Basis = "per_second"

    def __init__(self, settings: ProviderSettings, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._options = read_options(settings.options)
        self._now_ns = now_ns
        self._market = Market(self._options.seed)
        self._rentals: dict[str, Rental] | None = None

    async def offers(self, query: OfferQuery) -> Sequence[Offer]:
        """Return the machines nobody has."""
        now_ns = self._now_ns()
        free = self._free(now_ns)
        offers = [self._offer(machine, now_ns, bool(query.is_spot), query.disk_gb) for machine in free]
        return best_offers(offers, query)

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        """Rent a machine; it boots for a while."""
        machine = self._market.machines.get(offer_id.removesuffix(SPOT))
        now_ns = self._now_ns()
        if machine is None or machine not in self._free(now_ns):
            raise CapacityGone(NAME, "create", f"offer {offer_id} is taken; choose another")
        price = self._agreed(machine, spec, now_ns, offer_id.endswith(SPOT))
        if spec.disk_gb > machine.disk_gb:
            raise SpecRefused(NAME, "create", f"disk_gb {spec.disk_gb} is over the {machine.disk_gb} of {offer_id}")
        rental = self._rent(machine, spec, tag, price, now_ns)
        self._save()
        return self._seen(rental)

    async def get(self, id: str) -> ProviderInstance | None:
        """Return an instance of this market."""
        rental = self._find(id)
        return self._seen(rental) if rental else None

    async def list(self) -> Sequence[ProviderInstance]:
        """Return all that have not ended."""
        return [self._seen(rental) for rental in self._living()]

    async def find(self, tag: str) -> Sequence[ProviderInstance]:
        """Return the instance made with this tag."""
        return [self._seen(rental) for rental in self._living() if rental.tag == tag]

    async def start(self, id: str) -> None:
        """Boot again; one that was outbid needs the market to come down to its bid."""
        rental, now_ns = self._get(id), self._now_ns()
        if rental.state != "stopped":
            return
        machine = self._market.machines[rental.machine_id]
        if rental.is_spot and self._price(machine, now_ns, is_spot=True) > rental.price_nanousd_per_hour:
            raise CapacityGone(NAME, "start", f"instance {id} is outbid; wait, or rent another")
        rental.is_interrupted = False
        rental.move(now_ns, "pending")
        self._save()

    async def stop(self, id: str) -> None:
        """Stop at once."""
        rental = self._get(id)
        if rental.state in ("pending", "running"):
            rental.move(self._now_ns(), "stopped")
            self._save()

    async def destroy(self, id: str) -> None:
        """End it, and its cost, at once."""
        rental = self._find(id)
        if rental:
            rental.move(self._now_ns(), "gone")
            self._save()

    async def logs(self, id: str, tail: int) -> str:
        """Return its history, a line for each step."""
        lines = [f"{step.since_ns // 1_000_000_000} {step.state}" for step in self._get(id).steps]
        return "".join(f"{line}\n" for line in lines[-tail:])

    async def charges(self, since_ns: int, until_ns: int) -> Sequence[ProviderCharge]:
        """Return GPU and storage cost, one charge of each kind per instance."""
        found = []
        now_ns = self._now_ns()
        for rental in self._all().values():
            rental.advance(self._market, now_ns)
            machine = self._market.machines[rental.machine_id]
            gpu, storage = rental.cost_nanousd(machine, since_ns, min(until_ns, now_ns))
            found.append(_charge(rental.id, "gpu", gpu, since_ns, until_ns))
            found.append(_charge(rental.id, "storage", storage, since_ns, until_ns))
        return [charge for charge in found if charge.amount_nanousd]

    async def check(self) -> None:
        """Read the file, if there is one."""
        self._all()

    async def close(self) -> None:
        """Do nothing; what is to be kept is in the file already."""

    def _offer(self, machine: Machine, now_ns: int, is_spot: bool, disk_gb: int) -> Offer:
        return Offer(
            id=machine.id + (SPOT if is_spot else ""),
            provider=NAME,
            gpu_model=machine.gpu_model,
            gpu_count=machine.gpu_count,
            vram_gb=machine.vram_gb,
            price_nanousd_per_hour=self._price(machine, now_ns, is_spot) + _more_disk(machine, disk_gb),
            storage_nanousd_per_gb_hour=machine.storage_nanousd_per_gb_hour,
            region=machine.region,
            reliability=machine.reliability,
            cuda=machine.cuda,
            is_spot=is_spot,
            disk_gb=machine.disk_gb,
        )

    def _price(self, machine: Machine, now_ns: int, is_spot: bool) -> int:
        return self._market.price_nanousd_per_hour(machine, now_ns, is_spot)

    def _agreed(self, machine: Machine, spec: InstanceSpec, now_ns: int, is_spot: bool) -> int:
        """Return the price of the rental: the machine's, or the bid."""
        price = self._price(machine, now_ns, is_spot) + _more_disk(machine, spec.disk_gb)
        bid, most = spec.bid_nanousd_per_hour, spec.max_price_nanousd_per_hour
        if is_spot != (bid is not None):
            raise SpecRefused(NAME, "create", "a bid belongs to a spot offer and to no other; set or leave out bid")
        if bid is not None and bid < price:
            raise CapacityGone(NAME, "create", f"the bid is below what {machine.id} takes now; bid more")
        agreed = price if bid is None else bid
        if most is not None and agreed > most:
            raise CapacityGone(NAME, "create", f"{machine.id} is dearer now than listed or allowed; ask for offers")
        return agreed

    def _rent(self, machine: Machine, spec: InstanceSpec, tag: str, price: int, now_ns: int) -> Rental:
        rentals = self._all()
        id = str(max(map(int, rentals), default=1_000) + 1)
        public = {port: 40_000 + (int(id) * 64 + at) % 20_000 for at, port in enumerate(spec.ports)}
        rentals[id] = Rental(
            id=id,
            tag=tag,
            machine_id=machine.id,
            ports={port: self._options.ports.get(port, public[port]) for port in spec.ports},
            disk_gb=spec.disk_gb,
            price_nanousd_per_hour=price,
            is_spot=spec.bid_nanousd_per_hour is not None,
            boot_ns=round(self._options.boot_s * 1e9),
            will_fail=self._market.is_lucky(f"instance {id}", self._options.failures),
            steps=[Step(now_ns, "pending")],
        )
        return rentals[id]

    def _seen(self, rental: Rental) -> ProviderInstance:
        is_up = rental.state == "running"
        machine = self._market.machines[rental.machine_id]
        return ProviderInstance(
            id=rental.id,
            tag=rental.tag,
            state=rental.state,
            ip=(self._options.ip or f"203.0.113.{int(rental.machine_id[1:]) + 1}") if is_up else "",
            ports=dict(rental.ports) if is_up else {},
            gpu_model=machine.gpu_model,
            price_nanousd_per_hour=rental.price_nanousd_per_hour,
            storage_nanousd_per_hour=rental.disk_gb * machine.storage_nanousd_per_gb_hour,
            started_ns=rental.started_ns(),
            message="outbid" if rental.is_interrupted else "",
            is_interrupted=rental.is_interrupted,
        )

    def _free(self, now_ns: int) -> Sequence[Machine]:
        ours = {rental.machine_id for rental in self._living()}
        machines = self._market.machines.values()
        return [each for each in machines if each.id not in ours and not self._market.is_taken(each, now_ns)]

    def _living(self) -> Sequence[Rental]:
        return [rental for id in tuple(self._all()) if (rental := self._find(id))]

    def _find(self, id: str) -> Rental | None:
        rental = self._all().get(id)
        if rental is None:
            return None
        rental.advance(self._market, self._now_ns())
        return None if rental.state == "gone" else rental

    def _get(self, id: str) -> Rental:
        rental = self._find(id)
        if rental is None:
            raise InstanceGone(NAME, "read", f"there is no instance {id}; list them to see those there are")
        return rental

    def _all(self) -> dict[str, Rental]:
        if self._rentals is None:
            self._rentals = {rental.id: rental for rental in _load(self._options.file)}
        return self._rentals

    def _save(self) -> None:
        rentals = self._all()
        ended = [id for id, rental in rentals.items() if rental.state == "gone"]
        for id in ended[:-KEPT_MAX]:
            del rentals[id]
        if self._options.file:
            _store(self._options.file, tuple(rentals.values()))


def _more_disk(machine: Machine, disk_gb: int) -> int:
    """Return what a running machine costs more for a disk over the one that is included."""
    return max(0, disk_gb - DISK_GB) * machine.storage_nanousd_per_gb_hour


def _charge(id: str, kind: ChargeKind, amount: int, since_ns: int, until_ns: int) -> ProviderCharge:
    return ProviderCharge(instance_id=id, kind=kind, amount_nanousd=amount, since_ns=since_ns, until_ns=until_ns)


def _load(file: str) -> Sequence[Rental]:
    if not file:
        return ()
    try:
        return msgspec.json.decode(Path(file).read_bytes(), type=tuple[Rental, ...])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError) as error:
        raise ProviderUnavailable(NAME, "read", f"{file} cannot be used ({error}); repair or remove it") from error


def _store(file: str, rentals: tuple[Rental, ...]) -> None:
    try:
        new = Path(f"{file}.new")
        new.write_bytes(msgspec.json.encode(rentals))
        new.replace(file)
    except OSError as error:
        raise ProviderUnavailable(NAME, "create", f"{file} cannot be written ({error}); repair or remove it") from error


def register(registry: Registry) -> None:
    """Offer the provider."""
    registry.provider(Simulated)


_: type[ProviderAdapter] = Simulated
