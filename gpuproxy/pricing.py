"""What a call costs: prices in whole nanodollars, and the only divisions of money.

Workers reserve by it before a call and settle by it after; the ledger charges by it. All must agree to the nanodollar,
so there is one copy, below both.

A price is kept per million tokens, since a nanodollar per token is too coarse for cheap models. Every meter (input,
cached input, output, duration) is rounded up to a whole nanodollar once per call, so a call costs less than
four nanodollars more than exact arithmetic says, and never less. No call costs more than CHARGE_NANOUSD_MAX.
"""

from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache

from msgspec import Struct

from gpuproxy import config
from gpuproxy.types import CANCELLED, RENTED, Receipt, Usage

ANY = "*"  # as the model of a price: every model; as the tool: every tool
# So begins the outcome of a call that was not understood or could not be done, and of one whose server wants to know
# more first: the call is then made anew with what it asked for (MCP 2026-07-28, Multi Round-Trip Requests).
UNDONE = ("jsonrpc_error", "input_required")
MILLION = 1_000_000
US_PER_HOUR = 3_600_000_000
PRICE_NANOUSD_MAX = 10**15  # a million dollars, per million tokens or per call
METER_MAX = 10**12  # tokens or microseconds of one call; an upstream may claim any number
MARKUP_BPS_MIN = -10_000  # everything for nothing
MARKUP_BPS_MAX = 1_000_000  # a hundred times as much again
NEVER_NS = 1 << 63  # after every time the store can hold
FOUND_MAX = 4_096  # models and upstreams whose prices a catalogue remembers
CHARGE_NANOUSD_MAX = 10**13  # ten thousand dollars; more for one call is a mistake, and sums must fit 64 bits


class Price(Struct, frozen=True):
    """What one model, or a call of one tool, costs, at one upstream or (``upstream`` empty) at all.

    ``valid_from_ns`` is unix time in nanoseconds; a price holds until a newer one of the same model and upstream.
    One of ``model`` and ``tool`` is empty.
    """

    model: str
    upstream: str = ""
    input_nanousd_per_million: int = 0
    cached_input_nanousd_per_million: int = 0
    output_nanousd_per_million: int = 0
    request_nanousd: int = 0
    second_nanousd: int = 0
    valid_from_ns: int = 0
    tool: str = ""

    @property
    def is_free(self) -> bool:
        """Tell whether no call can cost anything."""
        tokens = (
            self.input_nanousd_per_million or self.cached_input_nanousd_per_million or self.output_nanousd_per_million
        )
        return not (tokens or self.request_nanousd or self.second_nanousd)


FREE = Price(ANY)


@lru_cache(maxsize=4_096)
def marked_up(price: Price, markup_bps: int) -> Price:
    """Return the price with a markup in hundredths of a percent, each part rounded up to a whole nanodollar.

    Workers reserve by it and name the markup in the receipt, the ledger charges by it.
    """
    if not markup_bps:
        return price
    factor = 10_000 + max(MARKUP_BPS_MIN, min(markup_bps, MARKUP_BPS_MAX))
    return Price(
        price.model,
        price.upstream,
        _marked(price.input_nanousd_per_million, factor),
        _marked(price.cached_input_nanousd_per_million, factor),
        _marked(price.output_nanousd_per_million, factor),
        _marked(price.request_nanousd, factor),
        _marked(price.second_nanousd, factor),
        price.valid_from_ns,
        price.tool,
    )


def _marked(amount_nanousd: int, factor: int) -> int:
    return -(-amount_nanousd * factor // 10_000)


def charge(usage: Usage, price: Price, duration_us: int = 0, is_served: bool = True) -> int:
    """Return what a call costs in nanodollars. Unknown (negative) counts are 0; cached tokens are part of the input.

    A call that was not served (`is_served` False: the upstream failed) pays for the tokens it got, nothing else.
    """
    return _charge(usage.input_tokens, usage.cached_tokens, usage.output_tokens, price, duration_us, is_served)


def _charge(
    input_tokens: int, cached_tokens: int, output_tokens: int, price: Price, duration_us: int, is_served: bool
) -> int:
    """Do what `charge` does; every stored receipt comes through here, so what is in range is not bounded by a call."""
    whole = input_tokens if 0 <= input_tokens <= METER_MAX else _bounded(input_tokens)
    cached = cached_tokens if 0 <= cached_tokens <= whole else min(_bounded(cached_tokens), whole)
    output = output_tokens if 0 <= output_tokens <= METER_MAX else _bounded(output_tokens)
    cost = (
        -(-(whole - cached) * price.input_nanousd_per_million // MILLION)
        - (-cached * price.cached_input_nanousd_per_million // MILLION)
        - (-output * price.output_nanousd_per_million // MILLION)
    )
    if is_served:
        cost += price.request_nanousd
        if price.second_nanousd:
            cost += _part(_bounded(duration_us), price.second_nanousd)
    return cost if cost <= CHARGE_NANOUSD_MAX else CHARGE_NANOUSD_MAX


def cost_of(receipt: Receipt, price: Price) -> int:
    """Return what a call costs in nanodollars: refused ones nothing, failed ones only the tokens they delivered.

    Nor does what the gateway has answered itself, such as the list of models: no attempt was made. Nor a call to a
    machine of the caller's own: that is paid by its time.
    """
    if receipt.outcome == "refused" or not receipt.user_id or not receipt.attempts or receipt.upstream == RENTED:
        return 0
    tokens = receipt.input_tokens, receipt.cached_tokens, receipt.output_tokens
    return _charge(*tokens, price, receipt.duration_us, _is_served(receipt))


def _is_served(receipt: Receipt) -> bool:
    """Tell whether the upstream did what was asked, or did it until the client left or the gateway broke it off.

    A tool is at work as soon as it is called, whether its answer begins at once or at its end.
    """
    if receipt.status >= 400 or receipt.rpc_outcome.startswith(UNDONE):
        return False
    if receipt.outcome in ("client_gone", "cut"):
        return receipt.first_byte_us >= 0 or receipt.rpc_outcome == CANCELLED
    return receipt.outcome == "ok"


def upper_bound(price: Price, input_tokens: int, output_tokens_max: int, duration_us_max: int = 0) -> int:
    """Return the most a call of at most these sizes can cost, in nanodollars; `charge` never exceeds it."""
    fresh, cached = price.input_nanousd_per_million, price.cached_input_nanousd_per_million
    is_rounded_twice = fresh % MILLION or cached % MILLION
    cost = (
        _part(_bounded(input_tokens), max(fresh, cached))
        + (1 if is_rounded_twice else 0)
        + _part(_bounded(output_tokens_max), price.output_nanousd_per_million)
        + price.request_nanousd
        + _part(_bounded(duration_us_max), price.second_nanousd)
    )
    return min(cost, CHARGE_NANOUSD_MAX)


def from_config(price: config.Price) -> Price:
    """Return the price as written in the configuration, exactly; cached input costs what input costs if not given."""
    return Price(
        price.model,
        price.upstream,
        nanousd_of(price.input_usd_per_million),
        nanousd_of(price.cached_input_usd_per_million or price.input_usd_per_million),
        nanousd_of(price.output_usd_per_million),
        nanousd_of(price.per_request_usd),
        nanousd_of(price.per_second_usd),
        tool=price.tool,
    )


def nanousd_of(text: str) -> int:
    """Return dollars such as ``0.15`` in nanodollars, exactly; nothing is 0. Raises ValueError for anything else."""
    if complaint := config.checks.usd(text):
        raise ValueError(complaint)
    return int(Decimal(text or "0").scaleb(9))


class Accrued(Struct, frozen=True):
    """What has come together over time: whole nanodollars, and a rest in 3,600,000,000ths of one.

    Nothing is rounded on the way, so it does not matter in how many steps an hour was counted.
    """

    nanousd: int = 0
    rest: int = 0

    def after(self, nanousd_per_hour: int, elapsed_us: int) -> "Accrued":
        """Return the sum after so many more microseconds at this rate."""
        whole, rest = divmod(self.rest + nanousd_per_hour * elapsed_us, US_PER_HOUR)
        return Accrued(self.nanousd + whole, rest)

    @property
    def due_nanousd(self) -> int:
        """Return the sum rounded up to a whole nanodollar: the one rounding there is."""
        return self.nanousd + (1 if self.rest else 0)


def with_markup(nanousd: int, percent_thousandths: int) -> int:
    """Return an amount with so many thousandths of a percent on top, rounded up to a whole nanodollar."""
    return -(-nanousd * (100_000 + percent_thousandths) // 100_000)


def markup_of(percent: str) -> int:
    """Return a percentage such as ``12.5`` in thousandths of a percent, exactly; nothing is 0. Raises ValueError."""
    if complaint := config.checks.percent(percent):
        raise ValueError(complaint)
    return int(Decimal(percent or "0").scaleb(3))


def without_markup(nanousd: int, percent_thousandths: int) -> int:
    """Return the most that, with the markup put on it, is not over `nanousd`."""
    return nanousd * 100_000 // (100_000 + percent_thousandths)


def seconds_paid(nanousd: int, nanousd_per_hour: int) -> int:
    """Return for how many whole seconds this much lasts at this rate; a rate of 0 lasts for ever."""
    return nanousd * 3_600 // nanousd_per_hour if nanousd_per_hour > 0 else METER_MAX


class Catalogue:
    """All prices, looked up by model and upstream.

    A price for the upstream beats one for all, a price for the model beats one for any: first model and upstream,
    then the model, then the upstream, then neither. For a call of a tool, prices of tools beat all others, in the
    same order.
    """

    def __init__(self, prices: Iterable[Price] = ()) -> None:
        self._prices: dict[tuple[str, str, str], list[Price]] = {}
        for price in prices:
            self._prices.setdefault((price.model, price.upstream, price.tool), []).append(price)
        for versions in self._prices.values():
            versions.sort(key=lambda price: price.valid_from_ns, reverse=True)  # stable: the first given wins
        self._found: dict[tuple[str, str, str], list[Price]] = {}

    def __bool__(self) -> bool:
        """Tell whether anything costs anything."""
        return bool(self._prices)

    @property
    def has_tools(self) -> bool:
        """Tell whether any tool has a price."""
        return any(tool for _, _, tool in self._prices)

    def find(self, model: str, upstream: str, at_ns: int, tool: str = "") -> Price:
        """Return the price in force at a time, FREE if there is none."""
        candidates = self._found.get((model, upstream, tool))
        if candidates is None:
            candidates = self._candidates(model, upstream, tool)
        for price in candidates:
            if price.valid_from_ns <= at_ns:
                return price
        return FREE

    def _candidates(self, model: str, upstream: str, tool: str) -> list[Price]:
        """Return what may hold, in the order in which it is asked; remembered, since few are asked for often."""
        if len(self._found) >= FOUND_MAX:
            self._found.clear()  # names may be any
        keys = [(model, upstream, ""), (model, "", ""), (ANY, upstream, ""), (ANY, "", "")]
        if tool:
            keys[:0] = [("", upstream, tool), ("", "", tool), ("", upstream, ANY), ("", "", ANY)]
        found = self._found[model, upstream, tool] = [price for key in keys for price in self._prices.get(key, ())]
        return found

    def holds(self, price: Price, at_ns: int) -> bool:
        """Tell whether a price is the version in force, at a time, of its model and upstream."""
        versions = self._prices.get((price.model, price.upstream, price.tool), ())
        return price == next((each for each in versions if each.valid_from_ns <= at_ns), None)

    def from_now_on(self, now_ns: int) -> list[Price]:
        """Return what holds at a time, for each model and upstream, and everything that will later."""
        return [price for versions in self._prices.values() for price in _until_past(versions, now_ns)]

    def next_change_ns(self, now_ns: int) -> int:
        """Return when the next version begins to hold, NEVER_NS if none will."""
        starts = (price.valid_from_ns for versions in self._prices.values() for price in versions)
        return min((start_ns for start_ns in starts if start_ns > now_ns), default=NEVER_NS)


def _until_past(versions: list[Price], now_ns: int) -> list[Price]:
    """Return those of the versions, newest first, that no newer one has replaced."""
    current = next((at for at, price in enumerate(versions) if price.valid_from_ns <= now_ns), len(versions))
    return versions[: current + 1]


def _bounded(count: int) -> int:
    return max(0, min(count, METER_MAX))


def _part(count: int, per_million: int) -> int:
    return -(-count * per_million // MILLION)
