"""What a GPU provider is: the nouns it speaks in, the calls it answers, the ways it fails.

An adapter is a thin translation of one marketplace. It keeps no truth: what we rented, what it cost and what must
be destroyed is the caller's to know and to store. The rules every adapter obeys:

- Unknown is not empty: `list` and `offers` raise when the provider fails or answers oddly.
- Create is never idempotent at a provider. The caller stores its intent first and passes a `tag`; after an error
  with ``may_have_worked`` it looks with `find` before anything else.
- Destroy asks. Only `get` answering None (or `list` without it) proves that an instance is gone; a refused credential
  proves nothing.
- Money is in whole nanodollars. Ids are the provider's own, without our prefix. Times are unix nanoseconds.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from msgspec import Struct

Basis = Literal["per_second", "prepaid"]
InstanceState = Literal["pending", "running", "stopped", "failed", "destroying", "gone"]
ChargeKind = Literal["gpu", "storage", "traffic", "prepaid", "other"]
Phase = Literal["search", "create", "read", "start", "stop", "destroy", "logs", "charges", "check"]


class ProviderSettings(Struct, frozen=True):
    """What a `[[providers]]` block says, with its credential read from the environment.

    An empty ``base_url`` is the provider's own. ``spacing_s`` is the least time between two calls of one kind, None
    what the provider asks for. ``options`` are what only this provider knows; an adapter refuses those it does not
    with ValueError.
    """

    api_key: str = ""
    base_url: str = ""
    spacing_s: float | None = None
    timeout_s: float = 30.0
    options: dict[str, str] = {}

    def __repr__(self) -> str:
        """Show everything but the credential."""
        key = "set" if self.api_key else "none"
        return f"ProviderSettings(api_key={key}, base_url={self.base_url!r}, options={sorted(self.options)})"


class OfferQuery(Struct, frozen=True, kw_only=True):
    """What to look for; None asks nothing. A bound on what an offer does not tell excludes the offer.

    ``min_vram_gb`` is per GPU, the price is for the whole offer. ``region`` is a country code ("US") or a part of the
    region's name. ``is_spot`` True asks for interruptible offers, False and None for those that stay. An offer fits
    whose ``disk_gb`` is as much or not told.
    """

    min_vram_gb: int | None = None
    max_price_nanousd_per_hour: int | None = None
    gpu_model: str | None = None
    gpu_count: int | None = None
    region: str | None = None
    min_reliability: float | None = None
    min_cuda: float | None = None
    is_spot: bool | None = None
    disk_gb: int = 10
    limit: int = 100


class Offer(Struct, frozen=True, kw_only=True):
    """Something that can be rented at the moment.

    ``vram_gb`` is per GPU. The price is for all GPUs with the query's disk; of a spot offer it is the least bid.
    Storage is what a stopped instance goes on costing. ``reliability`` is 0 to 1, ``cuda`` the newest version that
    runs; None where the provider does not tell. ``details`` are for people to read.
    """

    id: str
    provider: str
    gpu_model: str
    gpu_count: int
    vram_gb: int
    price_nanousd_per_hour: int
    storage_nanousd_per_gb_hour: int = 0
    region: str = ""
    reliability: float | None = None
    cuda: float | None = None
    is_spot: bool = False
    disk_gb: int = 0
    details: dict[str, str] = {}


SHELL = ("sh", "-c")  # the first words of a command that is one line for a shell


class InstanceSpec(Struct, frozen=True, kw_only=True):
    """What to run on a rented machine.

    ``ports`` are the ones inside to open. ``command`` are arguments of the image's entrypoint, but a line for a shell
    (`SHELL`, line) takes its place; an empty one leaves the image's own. ``duration_hours`` is what a
    prepaid provider is paid for. ``bid_nanousd_per_hour`` is needed for a spot offer, and only there. A machine dearer
    than ``max_price_nanousd_per_hour`` is not rented. ``label`` is the customer's and stays with us.
    """

    image: str
    env: dict[str, str] = {}
    ports: tuple[int, ...] = ()
    command: tuple[str, ...] = ()
    disk_gb: int = 10
    ssh_key: str = ""
    duration_hours: int = 1
    bid_nanousd_per_hour: int | None = None
    max_price_nanousd_per_hour: int | None = None
    label: str = ""


class ProviderInstance(Struct, frozen=True, kw_only=True):
    """One instance as its provider sees it now.

    ``tag`` is what `create` was given, empty for what is not ours. ``ports`` lead from a port inside to the one
    outside on ``ip`` (a name or an address), and are empty until it runs. ``price_nanousd_per_hour`` is what it costs
    while running, 0 if not told. ``started_ns`` is when it last began to run, after it had loaded and booted; 0 before
    that, or if not told. ``message`` is the provider's, for people. ``is_tls`` tells that the ports outside speak TLS.
    ``is_interrupted``: stopped because another bid more. ``is_reachable`` False: the provider has lost sight of it,
    and ``state`` is the last known. ``paid_nanousd`` is what a prepaid one has cost already.
    """

    id: str
    tag: str
    state: InstanceState
    ip: str = ""
    ports: dict[int, int] = {}
    gpu_model: str = ""
    price_nanousd_per_hour: int = 0
    storage_nanousd_per_hour: int = 0
    started_ns: int = 0
    message: str = ""
    is_tls: bool = False
    is_interrupted: bool = False
    is_reachable: bool = True
    paid_nanousd: int = 0


class ProviderCharge(Struct, frozen=True, kw_only=True):
    """What a provider says that it took for one instance and one kind of thing in a span of time."""

    instance_id: str
    kind: ChargeKind
    amount_nanousd: int
    since_ns: int
    until_ns: int
    description: str = ""


@runtime_checkable
class ProviderAdapter(Protocol):
    """Speaks to one marketplace. Every call raises ProviderError and nothing else; every wait is bounded.

    ``name`` is what API and configuration call it, ``aliases`` are other names for it. ``id_prefix`` is put before its
    ids to tell them from others' (``vast-123``). ``basis`` says whether time is billed as it passes, or paid ahead.
    The four are attributes of the class, which is what a plugin registers. Making one has no side effect; it is
    made in the control process only, so that what it needs (aiohttp) is imported on first use.
    """

    name: str
    aliases: tuple[str, ...]
    id_prefix: str
    basis: Basis

    def __init__(self, settings: ProviderSettings) -> None:
        """Keep the settings. Raises ValueError for an option that is unknown or wrong."""

    async def offers(self, query: OfferQuery) -> Sequence[Offer]:
        """Return what can be rented, cheapest first, every one fitting the query."""

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        """Rent, once, and return the new instance; never asks twice. `tag` is unique and at most 64 characters."""

    async def get(self, id: str) -> ProviderInstance | None:
        """Return the instance; None, or the state gone, only if it provably does not exist any more."""

    async def list(self) -> Sequence[ProviderInstance]:
        """Return all instances of the account, also those we did not make."""

    async def find(self, tag: str) -> Sequence[ProviderInstance]:
        """Return the instances that carry this tag: none, one, or more where a create was doubled."""

    async def start(self, id: str) -> None:
        """Ask a stopped instance to run. Raises InstanceGone, NotSupported."""

    async def stop(self, id: str) -> None:
        """Ask an instance to stop; its disk stays and costs. Raises InstanceGone, NotSupported."""

    async def destroy(self, id: str) -> None:
        """Ask for the end of an instance. One that is gone already is a success."""

    async def logs(self, id: str, tail: int) -> str:
        """Return up to `tail` last lines of what the instance printed. Raises InstanceGone."""

    async def charges(self, since_ns: int, until_ns: int) -> Sequence[ProviderCharge]:
        """Return what the provider took in a span of time."""

    async def check(self) -> None:
        """Ask something cheap that needs the credential. Raises ProviderError when the provider cannot be used."""

    async def close(self) -> None:
        """Give connections back. The adapter is not used afterwards."""
