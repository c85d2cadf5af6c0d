"""What calls cost now, as a worker looks it up: one dict look-up for a call, none while nothing has a price."""

from collections.abc import Iterable

from gpuproxy.pricing import NEVER_NS, Catalogue, Price

FOUND_MAX = 4_096  # answers remembered; a client may name any model at an upstream of its choice


class Prices:
    """The prices control has told, as they are at the time of the calls."""

    __slots__ = ("_catalogue", "_found", "_until_ns", "has_tools", "is_any")

    def __init__(self) -> None:
        self._catalogue = Catalogue()
        self._found: dict[tuple[str, ...], Price | None] = {}
        self._until_ns = NEVER_NS
        self.is_any = self.has_tools = False

    def replace(self, prices: Iterable[Price]) -> None:
        """Take what control has told; calls that are under way keep the price they began with."""
        self._catalogue = Catalogue(prices)
        self.is_any = bool(self._catalogue)
        self.has_tools = self._catalogue.has_tools
        self._begin(0)

    def find(self, model: str, upstream: str, at_ns: int) -> Price | None:
        """Return what a call that began at this unix time costs, None if nothing. About 0.2 µs."""
        if at_ns >= self._until_ns:
            self._begin(at_ns)
        key = model, upstream
        if key in self._found:
            return self._found[key]
        return self._look_up(key, model, upstream, at_ns)

    def find_tool(self, tool: str, upstream: str, at_ns: int, model: str = "") -> Price | None:
        """Return what a call of a tool costs, None if nothing."""
        if at_ns >= self._until_ns:
            self._begin(at_ns)
        key = model, upstream, tool
        if key in self._found:
            return self._found[key]
        return self._look_up(key, model, upstream, at_ns, tool)

    def _begin(self, at_ns: int) -> None:
        # the answers remembered hold until the next version of any price does
        self._found.clear()
        self._until_ns = self._catalogue.next_change_ns(at_ns)

    def _look_up(self, key: tuple[str, ...], model: str, upstream: str, at_ns: int, tool: str = "") -> Price | None:
        price = self._catalogue.find(model, upstream, at_ns, tool)
        if len(self._found) >= FOUND_MAX:
            self._found.clear()
        found = self._found[key] = None if price.is_free else price
        return found
