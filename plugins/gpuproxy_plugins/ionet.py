"""Provider "io.net": containers (CaaS) on the machines of the VM catalogue, over the enterprise API.

What shapes it: the credential goes into ``x-api-key`` and must be one of project io-cloud. A deployment is paid in
advance for whole hours, cannot be stopped, and has one HTTP port, which io.net puts behind a name with TLS. The tag is
the deployment's name, unique per account, so that a second create with one tag is refused. Renting takes four
calls: the machine as it is now, where it can be had, what it costs, the deploy.
"""

import re
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from gpuproxy.plugin import (
    Basis,
    CapacityGone,
    InstanceGone,
    InstanceSpec,
    InvalidAnswer,
    NotSupported,
    Offer,
    OfferQuery,
    Phase,
    ProviderAdapter,
    ProviderCharge,
    ProviderError,
    ProviderInstance,
    ProviderSettings,
    Registry,
    SpecRefused,
    best_offers,
)
from gpuproxy_plugins.ionet_errors import failure, words_of
from gpuproxy_plugins.ionet_wire import (
    NAME,
    Catalogue,
    Deployed,
    Deployment,
    Hardware,
    Listing,
    Place,
    Quote,
    Workers,
    deploy_body,
    read_deployment,
    read_listed,
    read_offer,
    read_time_ns,
)
from gpuproxy_plugins.provider_account import ProviderAccount
from gpuproxy_plugins.provider_http import Answer
from gpuproxy_plugins.provider_money import nanousd

BASE_URL = "https://api.io.solutions"
ROOT = "/enterprise/v1/io-cloud"
SPACING_S = {"read": 0.2, "change": 1.0}  # no limits are documented; this is polite
PAGE = 100  # the most the list gives
PAGES_MAX = 100
HOURS_MAX = 8_760

Thing = TypeVar("Thing")


class Data(Struct, Generic[Thing]):
    """The envelope of nearly every answer."""

    data: Thing


class IoNet:
    """One account at io.net."""

    name: str = NAME
    aliases: tuple[str, ...] = ("ionet",)
    id_prefix: str = "ionet"
    basis: Basis = "prepaid"

    def __init__(self, settings: ProviderSettings) -> None:
        headers = {"x-api-key": settings.api_key}
        self._http = ProviderAccount(NAME, BASE_URL, headers, settings, SPACING_S, self._failure, ROOT)
        self._tags: dict[str, str] = {}  # id to name, which only the list tells

    async def offers(self, query: OfferQuery) -> Sequence[Offer]:
        """Return what the catalogue has; there is nothing interruptible."""
        if query.is_spot:
            return []
        return best_offers(self._http.offers(await self._catalogue("search"), _offer), query)

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        """Pay for `duration_hours` and deploy one container."""
        refuse(spec)
        row = await self._machine(offer_id, spec)
        place = await self._place(row)
        paid = await self._quote(row, place, spec)
        answer = await self._http.ask(
            "change", "create", "POST", "/caas/deploy", body=deploy_body(spec, tag, row, place)
        )
        made = self._http.decode(answer, Deployed)
        if not _is_id(made.deployment_id):
            message = f"it names a deployment {self._http.shown(made.deployment_id)!r}; look for it in its console"
            raise InvalidAnswer(NAME, "create", message, may_have_worked=True)
        self._tags[made.deployment_id] = tag
        price = round(paid / spec.duration_hours)
        return ProviderInstance(
            id=made.deployment_id, tag=tag, state="pending", price_nanousd_per_hour=price, paid_nanousd=paid
        )

    async def get(self, id: str) -> ProviderInstance | None:
        """Return the deployment and, once it runs, its address."""
        if not _is_id(id):
            return None
        try:
            row = await self._deployment("read", id)
        except InstanceGone:
            return None
        workers = await self._workers("read", id) if row.status == "running" else Workers([])
        with self._http.meaning("read", f"deployment {id}"):
            return read_deployment(row, workers.workers, await self._tag(id))

    async def list(self) -> Sequence[ProviderInstance]:
        """Return all that have not ended."""
        return [each for each in await self._listed("read") if each.state != "gone"]

    async def find(self, tag: str) -> Sequence[ProviderInstance]:
        """Return the deployment of this name."""
        return [each for each in await self.list() if each.tag == tag]

    async def start(self, id: str) -> None:
        """Refuse: there is no such thing."""
        raise NotSupported(NAME, "start", "a deployment cannot be stopped or started; destroy it and rent again")

    async def stop(self, id: str) -> None:
        """Refuse: there is no such thing."""
        raise NotSupported(NAME, "stop", "a deployment cannot be stopped; destroy it, what was paid is spent")

    async def destroy(self, id: str) -> None:
        """Ask for the end; what has ended already may refuse, and is looked at then."""
        if not _is_id(id):
            return
        try:
            await self._http.ask("change", "destroy", "DELETE", f"/caas/deployment/{id}")
        except InstanceGone:
            return
        except InvalidAnswer:
            seen = await self.get(id)
            if seen is not None and seen.state not in ("gone", "destroying"):
                raise

    async def logs(self, id: str, tail: int) -> str:
        """Return the end of the first container's standard output."""
        if not _is_id(id):
            raise InstanceGone(NAME, "logs", f"{id[:40]!r} is no deployment; list them to see those there are")
        workers = (await self._workers("logs", id)).workers
        if not workers:
            return ""
        with self._http.meaning("logs", f"deployment {id}"):
            path = f"/caas/deployment/{id}/log/{_word(workers[0].container_id)}"
        answer = await self._http.ask("read", "logs", "GET", path, query={"stream": "stdout"})
        return "".join(answer.body.decode(errors="replace").splitlines(keepends=True)[-tail:])

    async def charges(self, since_ns: int, until_ns: int) -> Sequence[ProviderCharge]:
        """Return what was paid for deployments made in the span, also for those that have ended."""
        found = []
        for each in await self._listed("charges"):
            row = await self._deployment("charges", each.id)
            with self._http.meaning("charges", f"deployment {each.id}"):
                made_ns, paid = read_time_ns(row.created_at), row.amount_paid
                if paid and since_ns <= made_ns < until_ns:
                    found.append(_charge(each.id, nanousd(paid), made_ns, read_time_ns(row.finished_at) or until_ns))
        return found

    async def check(self) -> None:
        """Ask for one row of the list. The balance cannot be asked for with a key."""
        self._http.need_key("check")
        answer = await self._http.ask(
            "read", "check", "GET", "/caas/deployments", query={"page": "0", "page_size": "1"}
        )
        self._http.decode(answer, Data[Listing])

    async def close(self) -> None:
        """Close connections."""
        await self._http.close()

    async def _catalogue(self, phase: Phase) -> Sequence[msgspec.Raw]:
        answer = await self._http.ask("read", phase, "GET", "/vmaas/hardware")
        return self._http.decode(answer, Data[Catalogue]).data.hardware

    async def _machine(self, offer_id: str, spec: InstanceSpec) -> Hardware:
        """Return the machine of an offer as it is now. Raises CapacityGone, SpecRefused."""
        for raw in await self._catalogue("search"):
            row = _row(raw)
            if isinstance(row, Hardware) and row.id == offer_id and isinstance(_offer(raw), Offer):
                if row.storage is not None and spec.disk_gb > row.storage:
                    message = f"disk_gb {spec.disk_gb} is over the {row.storage:g} of {offer_id}; ask for less"
                    raise SpecRefused(NAME, "create", message)
                return row
        raise CapacityGone(NAME, "create", f"offer {self._http.shown(offer_id)!r} is gone; ask for offers")

    async def _place(self, row: Hardware) -> Place:
        """Return where it can be had, in the country of the offer. Raises CapacityGone."""
        query = {"hardware_id": str(row.deploy_id), "hardware_qty": str(row.num_cards)}
        answer = await self._http.ask("read", "search", "GET", "/caas/available-replicas", query=query)
        places = self._http.decode(answer, Data[tuple[Place, ...]]).data
        here = [each for each in places if each.available_replicas > 0 and row.location in (each.iso2, each.id)]
        if not here:
            raise CapacityGone(NAME, "create", f"offer {row.id} is taken in {row.location}; try the next")
        return here[0]

    async def _quote(self, row: Hardware, place: Place, spec: InstanceSpec) -> int:
        """Return what the whole duration costs. Raises CapacityGone if that is over the most allowed."""
        query = {
            "location_ids": msgspec.json.encode([place.id]).decode(),
            "hardware_id": str(row.deploy_id),
            "duration_hours": str(spec.duration_hours),
            "gpus_per_container": str(row.num_cards),
            "replica_count": "1",
        }
        answer = await self._http.ask("read", "search", "GET", "/caas/price", query=query)
        with self._http.meaning("search", f"the price of {row.id}"):
            paid = nanousd(self._http.decode(answer, Data[Quote]).data.total_cost_usdc)
        most = spec.max_price_nanousd_per_hour
        if most is not None and paid > most * spec.duration_hours:
            raise CapacityGone(NAME, "create", f"offer {row.id} is dearer now than listed or allowed; ask for offers")
        return paid

    async def _deployment(self, phase: Phase, id: str) -> Deployment:
        answer = await self._http.ask("read", phase, "GET", f"/caas/deployment/{id}")
        row = self._http.decode(answer, Data[Deployment]).data
        if row.id != id:
            shown = self._http.shown(row.id)
            raise InvalidAnswer(NAME, phase, f"asked about deployment {id}, it told of {shown}; try later")
        return row

    async def _workers(self, phase: Phase, id: str) -> Workers:
        answer = await self._http.ask("read", phase, "GET", f"/caas/deployment/{id}/containers")
        return self._http.decode(answer, Data[Workers]).data

    async def _tag(self, id: str) -> str:
        """Return the name of a deployment; one that another process made is looked up once."""
        if id not in self._tags:
            await self._listed("read")
        return self._tags.get(id, "")

    async def _listed(self, phase: Phase) -> Sequence[ProviderInstance]:
        """Return all pages, from 0 as the schema says; a list that counts from 1 shows its first page twice."""
        found: dict[str, ProviderInstance] = {}
        for number in range(PAGES_MAX):
            query = {"page": str(number), "page_size": str(PAGE)}
            answer = await self._http.ask("read", phase, "GET", "/caas/deployments", query=query)
            page = self._http.decode(answer, Data[Listing]).data
            with self._http.meaning(phase, "its list"):
                found.update((row.id, read_listed(row)) for row in page.deployments)
            if len(found) >= page.total:
                self._tags = {each.id: each.tag for each in found.values()}
                return tuple(found.values())
            if not page.deployments:
                message = f"it lists {len(found)} of {page.total} deployments; try later"
                raise InvalidAnswer(NAME, phase, message)
        raise InvalidAnswer(NAME, phase, f"its list does not end within {PAGES_MAX} pages; try later")

    def _failure(self, answer: Answer, path: str) -> ProviderError | None:
        if 200 <= answer.status < 300:
            return None
        words = words_of(answer.body)
        return failure(NAME, answer, words, self._http.shown(words), is_of_one="/deployment/" in path)


def refuse(spec: InstanceSpec) -> None:
    """Raise SpecRefused for what io.net cannot do."""
    complaint = ""
    if spec.bid_nanousd_per_hour is not None:
        complaint = "io.net takes no bids; leave out bid"
    elif spec.ssh_key:
        complaint = "its containers have no SSH; leave out ssh_key"
    elif len(spec.ports) > 1:
        complaint = f"its containers have one port, not {len(spec.ports)}; name one"
    elif not 1 <= spec.duration_hours <= HOURS_MAX:
        complaint = f"duration_hours {spec.duration_hours} is not 1 to {HOURS_MAX}; choose another"
    if complaint:
        raise SpecRefused(NAME, "create", complaint)


def _row(raw: msgspec.Raw) -> Hardware | ValueError:
    try:
        return msgspec.json.decode(raw, type=Hardware)
    except ValueError as error:
        return error


def _offer(raw: msgspec.Raw) -> Offer | ValueError | None:
    """Return the offer of a row, None if it is none to rent, the fault if it makes no sense."""
    row = _row(raw)
    try:
        return row if isinstance(row, ValueError) else read_offer(row)
    except (ValueError, ArithmeticError) as error:
        return ValueError(str(error))


def _charge(id: str, amount: int, since_ns: int, until_ns: int) -> ProviderCharge:
    return ProviderCharge(
        instance_id=id, kind="prepaid", amount_nanousd=amount, since_ns=since_ns, until_ns=max(since_ns, until_ns)
    )


def _is_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text) is not None


def _word(text: str) -> str:
    """Return what may stand in a path. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", text):
        raise ValueError(f"{text[:40]!r} is no container id")
    return text


def register(registry: Registry) -> None:
    """Offer the provider."""
    registry.provider(IoNet)


_: type[ProviderAdapter] = IoNet
