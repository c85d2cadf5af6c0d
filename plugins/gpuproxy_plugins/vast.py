"""Provider "vast.ai": the marketplace's HTTP API (console.vast.ai), as its own client 1.9.1 speaks it in November 2026.

What shapes it: a key goes into ``Authorization: Bearer``. The list is v1 and comes in pages of 25; v0's is retired and
answers 410. Calls of one kind must be some seconds apart, and searches have a quota a day. There is no
idempotency key: the tag is the instance's ``label``.
"""

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from msgspec import Struct

from gpuproxy.plugin import (
    SHELL,
    Basis,
    CapacityGone,
    InstanceGone,
    InstanceSpec,
    InsufficientFunds,
    InvalidAnswer,
    Offer,
    OfferQuery,
    Phase,
    ProviderAdapter,
    ProviderCharge,
    ProviderError,
    ProviderInstance,
    ProviderSettings,
    RateLimited,
    Registry,
    SpecRefused,
    best_offers,
    is_same_model,
)
from gpuproxy_plugins.provider_account import ProviderAccount
from gpuproxy_plugins.provider_http import Answer
from gpuproxy_plugins.provider_money import usd_text
from gpuproxy_plugins.vast_errors import DAY_S, Told, failure, is_success, read_told
from gpuproxy_plugins.vast_wire import (
    NAME,
    SPOT,
    ChargeRow,
    InstanceRow,
    OfferRow,
    read_charges,
    read_instance,
    read_offer,
    search_body,
)

BASE_URL = "https://console.vast.ai"
# Least seconds between calls: the vendor's x-rate-limit notes, searches 10 a minute, and a tenth more, for calls are
# longer or shorter on their way.
SPACING_S = {"search": 6.6, "create": 5.0, "list": 1.1, "one": 2.2, "state": 1.1, "destroy": 3.3, "other": 1.1}
PAGE = 25  # the most the list gives
PAGES_MAX = 400
CHARGES_PAGE = 500
NAMES_S = 3_600.0  # how long the catalogue of GPU names is believed
QUOTE_WAIT_S = 60.0  # a create waits so long for a quote; later comes none before midnight, when the quota is new
DAY_NS = DAY_S * 10**9
LOG_TRIES = 30  # the log is put somewhere and appears there within about nine seconds
LOG_TRY_S = 0.3
ID_DIGITS_MAX = 18


class Created(Struct):
    """The answer to a create."""

    new_contract: int


class One(Struct):
    """The answer about one instance: null when there is none, which must not be mistaken for a missing field."""

    instances: InstanceRow | None


class Page(Struct):
    """One page of the list."""

    instances: list[InstanceRow]
    next_token: str | None = None
    total_instances: int | None = None


class Offers(Struct):
    """The answer to a search, its rows not looked at yet."""

    offers: list[msgspec.Raw]


class Names(Struct):
    """The catalogue of GPU names."""

    gpu_names: list[str]


class Log(Struct):
    """Where a log will appear."""

    result_url: str


class User(Struct):
    """Our account there."""

    credit: float | None = None


class Charges(Struct):
    """One page of charges."""

    results: list[ChargeRow]
    next_token: str | None = None


class Vast:
    """One account at vast.ai."""

    name: str = NAME
    aliases: tuple[str, ...] = ("vast", "vastai")
    id_prefix: str = "vast"
    basis: Basis = "per_second"

    def __init__(self, settings: ProviderSettings, now_s: Callable[[], float] = time.time) -> None:
        headers = {"Authorization": f"Bearer {settings.api_key}"}
        self._http = ProviderAccount(NAME, BASE_URL, headers, settings, SPACING_S, self._failure)
        self._now_s = now_s
        self._names: tuple[str, ...] = ()
        self._names_until_s = 0.0
        self._disk: dict[str, int] = {}  # what a gigabyte costs an hour, of the spot offers found last

    async def offers(self, query: OfferQuery) -> Sequence[Offer]:
        """Search, and look at every row again: live answers hold rows that do not fit."""
        models = None
        if query.gpu_model is not None:
            models = [name for name in await self._gpu_names() if is_same_model(query.gpu_model, name)]
            if not models:
                return []
        found = await self._search(search_body(query, models), bool(query.is_spot), query.disk_gb)
        if query.is_spot:
            self._disk = {offer.id: offer.storage_nanousd_per_gb_hour for offer in found}
        return best_offers(found, query)

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        """Rent with one PUT; a most-allowed price is compared with a fresh quote first.

        Once the day's searches are used up there is none: then the instance tells its price, and is left if it is over.
        """
        native = offer_id.removesuffix(SPOT)
        if not _is_id(native):
            raise CapacityGone(NAME, "create", f"there is no offer {offer_id!r}; ask for offers")
        body = create_body(spec, tag, is_spot=offer_id.endswith(SPOT))
        if spec.bid_nanousd_per_hour is not None:
            body["price"] = usd_text(self._machine_bid(offer_id, spec.bid_nanousd_per_hour, spec.disk_gb))
        price: int | None = None
        try:
            price = spec.bid_nanousd_per_hour or await self._quote(native, spec)
        except RateLimited as error:
            if (error.retry_after_s or 0.0) <= QUOTE_WAIT_S:
                raise
        answer = await self._http.ask("create", "create", "PUT", f"/api/v0/asks/{native}/", body=body)
        id = str(self._http.decode(answer, Created).new_contract)
        if price is None:
            price = await self._price_made(id, spec)
        return ProviderInstance(id=id, tag=tag, state="pending", price_nanousd_per_hour=price)

    async def get(self, id: str) -> ProviderInstance | None:
        """Return the instance; a credential that is refused raises, though its status may be 404."""
        if not _is_id(id):
            return None
        try:
            answer = await self._http.ask("one", "read", "GET", f"/api/v0/instances/{id}/", query={"owner": "me"})
        except InstanceGone:
            return None
        row = self._http.decode(answer, One).instances
        if row is not None and row.id != int(id):
            raise InvalidAnswer(NAME, "read", f"asked about instance {id}, it told of {row.id}; try later")
        return None if row is None else self._instance(row)

    async def list(self) -> Sequence[ProviderInstance]:
        """Return all pages."""
        return await self._listed({})

    async def find(self, tag: str) -> Sequence[ProviderInstance]:
        """Return the instances with this label."""
        return [each for each in await self._listed({"label": {"eq": tag}}) if each.tag == tag]

    async def start(self, id: str) -> None:
        """Ask it to run; it waits for its own GPU."""
        await self._change("start", id, {"state": "running"})

    async def stop(self, id: str) -> None:
        """Ask it to stop."""
        await self._change("stop", id, {"state": "stopped"})

    async def destroy(self, id: str) -> None:
        """Ask for the end."""
        if not _is_id(id):
            return
        try:
            await self._http.ask("destroy", "destroy", "DELETE", f"/api/v0/instances/{id}/", body={})
        except InstanceGone:
            return

    async def logs(self, id: str, tail: int) -> str:
        """Have the log put somewhere, and fetch it from there without the credential."""
        self._need_id("logs", id)
        path = f"/api/v0/instances/request_logs/{id}/"
        url = self._http.decode(
            await self._http.ask("other", "logs", "PUT", path, body={"tail": str(tail)}), Log
        ).result_url
        for _ in range(LOG_TRIES):
            answer = await self._http.fetch("logs", url)
            if answer.status == 200:
                return "".join(answer.body.decode(errors="replace").splitlines(keepends=True)[-tail:])
            await asyncio.sleep(LOG_TRY_S)
        raise InvalidAnswer(NAME, "logs", f"the log of instance {id} did not appear; try later")

    async def charges(self, since_ns: int, until_ns: int) -> Sequence[ProviderCharge]:
        """Return what instances cost, by kind, from the beginning of the first day on: it filters by days."""
        days = {"day": {"gte": since_ns // DAY_NS * DAY_S, "lte": until_ns // 1_000_000_000}}
        query = {"select_filters": _json(days), "limit": str(CHARGES_PAGE), "format": "table", "latest_first": "false"}
        found: list[ProviderCharge] = []
        for _ in range(PAGES_MAX):
            answer = await self._http.ask("other", "charges", "GET", "/api/v0/charges/", query=query)
            page = self._http.decode(answer, Charges)
            with self._http.meaning("charges", "a charge"):
                found += [part for row in page.results for part in read_charges(row, since_ns, until_ns)]
            if not page.next_token or page.next_token == query.get("after_token"):
                return found
            query["after_token"] = page.next_token
        raise InvalidAnswer(NAME, "charges", f"its charges do not end within {PAGES_MAX} pages; ask for fewer days")

    async def check(self) -> None:
        """Ask for our account. Raises Unauthorized without a key, InsufficientFunds without credit."""
        self._http.need_key("check")
        answer = await self._http.ask("other", "check", "GET", "/api/v0/users/current/")
        user = self._http.decode(answer, User)
        if user.credit is not None and user.credit <= 0:
            raise InsufficientFunds(NAME, "check", f"the account's credit is {user.credit:g} dollars; add credit")

    async def close(self) -> None:
        """Close connections."""
        await self._http.close()

    def _machine_bid(self, offer_id: str, bid_nanousd_per_hour: int, disk_gb: int) -> int:
        """Return what of a bid is left for the machine, whose disk vast.ai charges on top."""
        if offer_id not in self._disk:
            raise CapacityGone(NAME, "create", f"offer {offer_id} is gone; ask for offers")
        left = bid_nanousd_per_hour - self._disk[offer_id] * disk_gb
        if left <= 0:
            raise CapacityGone(NAME, "create", f"the bid does not pay for the disk of {disk_gb} GB; bid more")
        return left

    async def _search(self, body: dict[str, object], is_spot: bool, disk_gb: int) -> Sequence[Offer]:
        answer = await self._http.ask("search", "search", "POST", "/api/v0/bundles/", body=body)
        return self._http.offers(
            self._http.decode(answer, Offers).offers, partial(_offer, is_spot=is_spot, disk_gb=disk_gb)
        )

    async def _quote(self, native: str, spec: InstanceSpec) -> int:
        """Return the price the offer has now, 0 if nobody cares. Raises CapacityGone if it is over the most allowed."""
        most = spec.max_price_nanousd_per_hour
        if most is None:
            return 0
        query = {**search_body(OfferQuery(disk_gb=spec.disk_gb, limit=1), None), "id": {"eq": int(native)}}
        found = [each for each in await self._search(query, False, spec.disk_gb) if each.id == native]
        if not found:
            raise CapacityGone(NAME, "create", f"offer {native} is gone; ask for offers")
        if found[0].price_nanousd_per_hour > most:
            raise CapacityGone(NAME, "create", f"offer {native} is dearer now than listed or allowed; ask for offers")
        return found[0].price_nanousd_per_hour

    async def _price_made(self, id: str, spec: InstanceSpec) -> int:
        """Return the price of a new instance, 0 if it is not told. Raises CapacityGone, naming it, if it is over."""
        most = spec.max_price_nanousd_per_hour or 0
        try:
            made = await self.get(id)
        except ProviderError:
            return 0
        price = made.price_nanousd_per_hour if made else 0
        if price > most + most // 1_000:  # more than was rounded
            message = "the offer is dearer now than listed or allowed; try another"
            raise CapacityGone(NAME, "create", message, instance_id=id)
        return price

    async def _gpu_names(self) -> tuple[str, ...]:
        """Return how vast.ai spells its GPUs, for a search takes exact names only."""
        if self._now_s() >= self._names_until_s:
            answer = await self._http.ask("other", "search", "GET", "/api/v0/gpu_names/unique/")
            self._names = tuple(self._http.decode(answer, Names).gpu_names)
            self._names_until_s = self._now_s() + NAMES_S
        return self._names

    async def _listed(self, filters: dict[str, object]) -> Sequence[ProviderInstance]:
        """Return all pages. Raises InvalidAnswer for a list that does not hold what it says it holds."""
        query = {"limit": str(PAGE), "select_filters": _json(filters), "order_by": '[{"col":"id","dir":"asc"}]'}
        rows: dict[int, InstanceRow] = {}
        for _ in range(PAGES_MAX):
            answer = await self._http.ask("list", "read", "GET", "/api/v1/instances/", query=query)
            page = self._http.decode(answer, Page)
            rows.update((row.id, row) for row in page.instances)
            if not page.next_token:
                if page.total_instances is not None and len(rows) < page.total_instances:
                    message = f"it lists {len(rows)} of {page.total_instances} instances; try later"
                    raise InvalidAnswer(NAME, "read", message)
                return [self._instance(row) for row in rows.values()]
            query["after_token"] = page.next_token
        raise InvalidAnswer(NAME, "read", f"its list does not end within {PAGES_MAX} pages; destroy what is not needed")

    async def _change(self, phase: Phase, id: str, body: dict[str, object]) -> None:
        self._need_id(phase, id)
        await self._http.ask("state", phase, "PUT", f"/api/v0/instances/{id}/", body=body)

    def _failure(self, answer: Answer, path: str) -> ProviderError | None:
        told = read_told(answer.body)
        if is_success(answer, told):
            return None
        return failure(NAME, answer, told, self._shown(answer, told), self._now_s())

    def _shown(self, answer: Answer, told: Told) -> str:
        words = ": ".join(str(part) for part in (told.error, told.msg or told.detail) if part)
        is_html = b"<html" in answer.body[:200].lower()
        return self._http.shown(words or ("a web page" if is_html else answer.body[:500].decode(errors="replace")))

    def _instance(self, row: InstanceRow) -> ProviderInstance:
        with self._http.meaning("read", f"instance {row.id}"):
            return read_instance(row)

    def _need_id(self, phase: Phase, id: str) -> None:
        if not _is_id(id):
            raise InstanceGone(NAME, phase, f"{id[:40]!r} is no instance of vast.ai; list them to see those there are")


def create_body(spec: InstanceSpec, tag: str, is_spot: bool) -> dict[str, object]:
    """Return the body that rents. Raises SpecRefused for a spot offer without a bid and for a bid on another.

    Without an SSH key the image keeps its entrypoint and gets the command as arguments, unless that is a line for a
    shell, which takes the place of both; with one vast.ai replaces the
    entrypoint by sshd, so that the command runs from ``onstart``. ``cancel_unavail`` spares us a stopped instance
    that costs storage when nothing can run.
    """
    if is_spot != (spec.bid_nanousd_per_hour is not None):
        raise SpecRefused(NAME, "create", "a bid belongs to a spot offer and to no other; set or leave out bid")
    body: dict[str, object] = {
        "client_id": "me",
        "image": spec.image,
        "disk": float(spec.disk_gb),
        "env": {**spec.env, **{f"-p {port}:{port}": "1" for port in spec.ports}},
        "label": tag,
        "target_state": "running",
        "cancel_unavail": True,
        **_run(spec),
    }
    return body


def _run(spec: InstanceSpec) -> dict[str, object]:
    if not spec.ssh_key and spec.command[:2] == SHELL:  # ``onstart`` takes the entrypoint's place
        return {"runtype": "args", "onstart": "/bin/sh", "args": list(spec.command[1:])}
    if not spec.ssh_key:
        return {"runtype": "args", "args": list(spec.command)}
    key = shlex.quote(spec.ssh_key.strip())
    lines = [f"mkdir -p /root/.ssh && echo {key} >> /root/.ssh/authorized_keys", shlex.join(spec.command)]
    return {"runtype": "ssh_direc ssh_proxy", "onstart": "\n".join(line for line in lines if line)}


def _offer(raw: msgspec.Raw, is_spot: bool, disk_gb: int) -> Offer | ValueError | None:
    """Return the offer of a row, None if it is none to rent, the fault if it makes no sense."""
    try:
        return read_offer(msgspec.json.decode(raw, type=OfferRow, strict=False), is_spot, disk_gb)
    except (ValueError, ArithmeticError) as error:
        return ValueError(str(error))


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= ID_DIGITS_MAX


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def register(registry: Registry) -> None:
    """Offer the provider."""
    registry.provider(Vast)


_: type[ProviderAdapter] = Vast
