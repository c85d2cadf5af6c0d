"""Our count of what providers cost against what they say they took, a day at a time.

The difference is noted and nothing is changed: who is right is for a person to find out. Traffic is no difference:
nobody but the provider can count it, so it is booked as told. Rentals are compared once they have ended, an hour later,
when the provider has written up everything.
"""

from collections import Counter
from datetime import datetime, timedelta
from typing import Any

from msgspec import Struct, structs
from sqlalchemy import Connection, Row, select

from gpuproxy.fleet.findings import Look, add, looks, note_comparison, note_no_comparison
from gpuproxy.fleet.meter import owe_traffic
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rentals import locked
from gpuproxy.fleet.states import ENDED
from gpuproxy.ledger.usage import unix_ns
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ProviderError
from gpuproxy.store.schema import rentals

TOLERANCE_THOUSANDTHS = 5  # half a percent,
TOLERANCE_NANOUSD = 10_000_000  # and a cent: of a short rental the seconds between two looks are more than a percent
DAY = timedelta(days=1)
LAG = timedelta(hours=1)

logger = get_logger(__name__)


class Difference(Struct, frozen=True):
    """A rental that has cost other than counted."""

    contract_id: str
    told_nanousd: int
    counted_nanousd: int


class Comparison(Struct, frozen=True):
    """What the machines that ended in a span of time have cost, by a provider's word and by ours, and those apart."""

    provider: str
    rental_count: int = 0
    told_nanousd: int = 0
    counted_nanousd: int = 0
    unknown_nanousd: int = 0  # taken for machines that are not ours
    traffic_nanousd: int = 0  # of ours, over what is told; no customer is charged for it
    differing: tuple[Difference, ...] = ()
    traffic: tuple[tuple[str, int], ...] = ()  # by contract

    @property
    def is_off(self) -> bool:
        """Tell whether the difference is worth a look."""
        return _differs(self.told_nanousd, self.counted_nanousd)


async def compare(fleet: Fleet, provider: str, since: datetime, until: datetime) -> Comparison:
    """Compare a provider's charges with our count, for the rentals that ended in [since, until).

    Raises ProviderError.
    """
    ended, known = await fleet.read(_ended, provider, since, until)
    begin = min((row.created_at for row in ended), default=since) - LAG  # the provider's clock may be behind
    told, traffic = Counter[str](), Counter[str]()
    for charge in await fleet.providers[provider].charges(unix_ns(begin), unix_ns(fleet.now())):
        (traffic if charge.kind == "traffic" else told)[charge.instance_id] += charge.amount_nanousd
    pairs = [Difference(row.id, told[row.native_id], row.cost_posted_nanousd) for row in ended]
    return Comparison(
        provider,
        len(pairs),
        sum(each.told_nanousd for each in pairs),
        sum(each.counted_nanousd for each in pairs),
        sum(amount for native, amount in (told + traffic).items() if native not in known),
        sum(traffic[row.native_id] for row in ended),
        tuple(each for each in pairs if _differs(each.told_nanousd, each.counted_nanousd)),
        tuple((row.id, traffic[row.native_id]) for row in ended if traffic[row.native_id] > 0),
    )


async def report(fleet: Fleet) -> list[Comparison]:
    """Compare with each provider what has ended since the last time, if that is a day ago; note what is off."""
    until = fleet.now() - LAG
    before = await fleet.read(looks)
    found = []
    for provider in fleet.providers:
        since = before.get(provider, Look(provider)).compared_until or until - DAY
        if until - since < DAY:
            continue
        try:
            comparison = await compare(fleet, provider, since, until)
        except ProviderError as error:
            logger.warning("provider does not say what it took", provider=provider, error=str(error))
            await fleet.write(note_no_comparison, provider, str(error))
            continue
        await fleet.write(_note, comparison, until)
        found.append(comparison)
    return found


def _note(connection: Connection, comparison: Comparison, until: datetime) -> None:
    facts = {**structs.asdict(comparison), "differing": len(comparison.differing)}
    del facts["traffic"]
    for contract_id, amount in comparison.traffic:
        owe_traffic(connection, locked(connection, contract_id), amount)
    note_comparison(connection, comparison.provider, until, facts)
    for each in comparison.differing:
        detail = {"told_nanousd": each.told_nanousd, "counted_nanousd": each.counted_nanousd}
        add(connection, comparison.provider, "difference", each.contract_id, detail, until)
    say = logger.warning if comparison.is_off else logger.info
    say("rentals compared with the provider's charges", **facts)


def _ended(connection: Connection, provider: str, since: datetime, until: datetime) -> tuple[list[Row[Any]], set[str]]:
    """Return the rentals whose end was noted in the span, and the provider's ids of all that were ever ours.

    What was lost has ended when it was last seen: maybe before the last comparison, which did not know of it.
    """
    of_provider = (rentals.c.provider == provider) & (rentals.c.native_id != "")
    in_span = rentals.c.state.in_(ENDED) & (rentals.c.moved_at >= since) & (rentals.c.moved_at < until)
    shown = (rentals.c.id, rentals.c.native_id, rentals.c.cost_posted_nanousd, rentals.c.created_at)
    ended: list[Row[Any]] = list(connection.execute(select(*shown).where(of_provider, in_span)))
    return ended, set(connection.scalars(select(rentals.c.native_id).where(of_provider)))


def _differs(told_nanousd: int, counted_nanousd: int) -> bool:
    difference, most = abs(told_nanousd - counted_nanousd), max(told_nanousd, counted_nanousd)
    return difference > TOLERANCE_NANOUSD and difference * 1_000 > most * TOLERANCE_THOUSANDTHS
