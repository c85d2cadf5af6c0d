"""Every route: declared, described, and open to those its rule names and nobody else."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gpuproxy_plugins.manual import Manual
from msgspec import structs
from sqlalchemy import update

from gpuproxy.access.accounts import create_key
from gpuproxy.access.paging import Page
from gpuproxy.billing.payments import add, new_payment
from gpuproxy.billing.settle import complete
from gpuproxy.control.openapi import ERROR, FORWARDED, QUERY_TYPES, Envelope, document
from gpuproxy.control.pages.table import PAGES
from gpuproxy.control.route import RULES, Route
from gpuproxy.control.table import TABLE
from gpuproxy.errors import CODES
from gpuproxy.fleet import findings
from gpuproxy.fleet.rent import Wish, rent, wait_until_running
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.budgets import set_budget
from gpuproxy.plugin import InstanceSpec, OfferQuery, PaymentEvent, PaymentProvider, PaymentSettings
from gpuproxy.proxy import envelope
from gpuproxy.store.schema import deliveries

from .conftest import PASSWORD, Api, Person

PAYMENT = "a payment of the owner's"
NEW_PASSWORD = "another horse battery staple"
# What each route that takes a body is sent, by whom, about whose things.
BODIES: dict[str, Any] = {
    "checkout": lambda caller: {"amount_usd": "12.50"},
    "confirm": lambda caller: {},
    "refund": lambda caller: {"payment_id": PAYMENT},
    "set_auto_renew": lambda caller: {"is_enabled": False},
    "register": lambda caller: {"email": f"new-{caller.email}", "password": PASSWORD},
    "log_in": lambda caller: {"email": caller.email, "password": PASSWORD},
    "refresh": lambda caller: {"refresh_token": caller.refresh_token},
    "change_password": lambda caller: {"current_password": PASSWORD, "new_password": NEW_PASSWORD},
    "make": lambda caller: {"name": "made"},
    "rotate": lambda caller: {},
    "change": lambda caller: {"is_active": True},
    "rent_offer": lambda caller: {"image": "x"},
    "reserve": lambda caller: {"count": 1},
    "add_credits": lambda caller: {"user_id": caller.id, "amount": 100.00},
    "take_credits": lambda caller: {"user_id": caller.id, "amount": 1.00},
    "set_low_threshold": lambda caller: {"threshold": 5},
    "set_own": lambda caller: {"limit": 5, "window_s": 86_400},
    "set_any": lambda caller: {"limit": "5.00", "window_s": 86_400, "user_id": caller.id},
    "change_terms": lambda caller: {"markup_bps": 1_500, "overdraft": 10},
    "set_price": lambda caller: {"model": f"model of {caller.id}", "per_request_usd": "0.10"},
    "make_webhook": lambda caller: {"url": "https://example.com/hook", "events": ["instance.created"]},
    "make_billing_webhook": lambda caller: {"url": "https://example.com/hook"},
    "change_webhook": lambda caller: {"description": "changed"},
    "rotate_secret": lambda caller: {},
    "add_upstream": lambda caller: {**UPSTREAM, "name": f"made-{caller.id.lower()}"},
    "put_upstream": lambda caller: UPSTREAM,
    "add_model": lambda caller: {"name": f"model of {caller.id}", "targets": [{"upstream": "set"}]},
    "put_model": lambda caller: {"name": "set", "targets": [{"upstream": "set"}]},
}
UPSTREAM = {"name": "set", "protocol": "https", "urls": ["http://set"]}
WHO = (
    "anonymous",
    "other account",
    "inference-only key",
    "read-only key",
    "own key",
    "owner",
    "admin",
    "key of an admin",
)
OK = 0


def name_of(route: Route) -> str:
    return route.handler.__name__


def expected(route: Route, who: str) -> int:
    """Return the status of the refusal, OK for none."""
    is_key = who in ("inference-only key", "read-only key", "own key", "key of an admin")
    if route.rule == "anyone":
        return OK
    if who == "anonymous":
        return 401
    if route.rule == "key":
        return OK
    if route.rule == "admin":
        return OK if who in ("admin", "key of an admin") else 403
    if who == "inference-only key" or (is_key and name_of(route) == "log_out"):
        return 403
    if who == "read-only key" and route.rule != "read":
        return 403
    is_own = who in ("own key", "owner", "read-only key")
    return 404 if "{id}" in route.path and name_of(route) != "rent_offer" and not is_own else OK


class World:
    """An owner, a stranger and an admin, new for each call: calls change them."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def visit(self, route: Route, who: str) -> tuple[Person, int, Any]:
        """Call `route` about the owner's things as `who`; return the owner, status and body."""
        owner, other, admin = [await self._api.person(is_admin) for is_admin in (False, False, True)]
        caller = {"other account": other, "admin": admin, "key of an admin": admin}.get(who, owner)
        headers = {
            "anonymous": {},
            "inference-only key": await self._key(owner, "inference"),
            "read-only key": await self._key(owner, "read"),
            "own key": owner.by_key,
            "key of an admin": await self._key(admin, "inference", "account", "admin"),
        }.get(who, caller.by_token)
        provider = "simulated" if "/gpu/" in route.path else "bank"
        subject = await self._subject(route, owner, other, admin)
        path = route.path.replace("{id}", subject).replace("{provider}", provider)
        path += f"?user_id={owner.id}" if "user_id" in route.query else ""
        body = BODIES[name_of(route)](caller) if route.takes else None
        if body and body.get("payment_id") == PAYMENT:
            body["payment_id"] = await self._payment(owner, is_paid=True)
        status, told = await self._call(route.method, path, body, headers)
        return owner, status, told

    async def _call(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
        return await self._api.call(method, path, body, headers)

    async def _payment(self, person: Person, is_paid: bool) -> str:
        payment = new_payment(person.id, "bank", "checkout", 10**9)
        async with self._api.store.writing() as connection:
            await connection.run_sync(add, payment)
            if is_paid:
                await connection.run_sync(complete, payment, 10**9, "ref")
        return payment.id

    async def _subject(self, route: Route, owner: Person, *others: Person) -> str:
        """Return the id of the owner's thing that the route is about."""
        if route.path.startswith("/.well-known/"):
            return "tools"
        if route.path.endswith("/credits/take"):
            for person in (owner, *others):
                await credit(self._api.store, person.id, 100 * 10**9, f"gift {person.id}")
        if "/webhooks" in route.path:
            return await self._webhook(route, owner)
        if "/budgets/" in route.path:
            return await self._budget(owner)
        if "/payments/" in route.path:
            return await self._payment(owner, is_paid=False)
        if "/gpu/" in route.path:
            return await self._machine(route, owner, *others)
        if "/fleet/findings/" in route.path:
            return await self._finding()
        if "/admin/upstreams" in route.path or "/admin/models" in route.path:
            return await self._routed(route)
        return owner.id if "/users/" in route.path else owner.key_id

    async def _routed(self, route: Route) -> str:
        """Set the upstream, and if it is about models the model, that the route is about."""
        admin = await self._api.person(is_admin=True)
        for name in ("upstream", "model"):
            if name == "upstream" or "/models" in route.path:
                body = BODIES[f"put_{name}"](admin)
                status, told = await self._api.call("PUT", f"/api/v1/admin/{name}s/set", body, admin.by_token)
                assert status == 200, told
        return "set"

    async def _webhook(self, route: Route, owner: Person) -> str:
        body = BODIES["make_webhook"](owner)
        _, made = await self._api.call("POST", "/api/v1/webhooks", body, owner.by_token)
        if "/deliveries/{id}" not in route.path:
            return str(made["id"])
        _, sent = await self._api.call("POST", f"/api/v1/webhooks/{made['id']}/test", None, owner.by_token)
        async with self._api.store.writing() as connection:
            await connection.execute(update(deliveries).values(state="delivered"))
        return str(sent["id"])

    async def _machine(self, route: Route, owner: Person, *others: Person) -> str:
        """Return an offer's id, or for routes about rentals the id of one of the owner's."""
        for person in (owner, *others):
            await credit(self._api.store, person.id, 1_000_000_000_000, f"gift {person.id}")
        if name_of(route) in ("list_offers", "reserve"):
            return ""
        offer = (await self._api.fleet.providers["simulated"].offers(OfferQuery()))[0]
        if name_of(route) in ("show_offer", "rent_offer"):
            return offer.id
        wish = Wish(user_id=owner.id, offer=offer, spec=InstanceSpec(image="x"))
        rental, _ = await rent(self._api.fleet, wish)
        return (await wait_until_running(self._api.fleet, rental, 20)).id

    async def _finding(self) -> str:
        async with self._api.store.writing() as connection:
            await connection.run_sync(findings.add, "simulated", "foreign", "77", {"tag": ""}, datetime.now(UTC))
            return (await connection.run_sync(findings.page, Page(), "", "", True))[0].id

    async def _budget(self, person: Person) -> str:
        async with self._api.store.writing() as connection:
            return (await connection.run_sync(set_budget, person.id, "", 3_600, 10**9, False)).id

    async def _key(self, person: Person, *scopes: str) -> dict[str, str]:
        secret, _ = await create_key(self._api.store, person.email, scopes=scopes)
        return {"X-API-Key": secret}


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database: who may call does not depend on the kind."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


class Bank(Manual):
    """A provider that takes and tells everything."""

    name = "bank"

    def parse_webhook(self, headers: Mapping[str, str], body: bytes) -> list[PaymentEvent]:
        return []


@pytest.fixture
async def providers() -> Mapping[str, PaymentProvider]:
    """Return who takes payments."""
    return {"bank": Bank(PaymentSettings())}


@pytest.fixture
def world(api: Api) -> World:
    return World(api)


@pytest.mark.parametrize("route", TABLE, ids=lambda route: f"{route.method} {route.path}")
async def test_a_route_is_open_to_those_its_rule_names(world: World, route: Route) -> None:
    for who in WHO:
        owner, status, told = await world.visit(route, who)
        refusal = expected(route, who)
        if refusal == OK:
            assert status == route.status or route.path == "/ws", (who, told)
            assert caller_is_owner(who) or is_silent_about(owner, route, told), who
        else:
            assert (who, status, set(told)) == (who, refusal, {"error", "code", "request_id"})


def caller_is_owner(who: str) -> bool:
    return who in ("inference-only key", "read-only key", "own key", "owner")


def is_silent_about(owner: Person, route: Route, told: Any) -> bool:
    return route.rule in ("admin", "anyone") or owner.id not in repr(told)


@pytest.mark.parametrize("route", [route for route in TABLE if route.gives], ids=name_of)
async def test_a_route_gives_what_it_declares(world: World, route: Route) -> None:
    _, _, told = await world.visit(route, "admin" if route.rule == "admin" else "owner")
    if route.shape == "plain":
        read(told, route.gives)
    elif route.shape == "list":
        assert (told["count"], told["status"]) == (len(told["data"]), "success")
        read(told["data"], list[route.gives])  # type: ignore[name-defined]
    else:
        assert told["status"] == "success"
        data = {name: value for name, value in told["data"].items() if name != "status"}  # a rental's own, in data only
        assert data == {name: value for name, value in told.items() if name not in ("data", "status")}
        read(told["data"], route.gives)


def read(told: Any, kind: Any) -> None:
    msgspec.json.decode(msgspec.json.encode(told), type=kind)


@pytest.mark.parametrize("route", [route for route in TABLE if route.takes], ids=name_of)
async def test_a_field_that_is_not_known_is_refused_by_name(api: Api, route: Route) -> None:
    person = await api.person(is_admin=True)
    for field in {"is_owner", "user_id", "credits", "role"} - _declared_for_admins(route):
        body = {**BODIES[name_of(route)](person), field: 1}
        status, told = await api.call(
            route.method, route.path.replace("{id}", "x").replace("{provider}", "sim"), body, person.by_token
        )
        assert (status, told["code"]) == (422, "UNPROCESSABLE")
        assert f"no field '{field}'" in told["error"]


def _declared_for_admins(route: Route) -> set[str]:
    assert route.takes is not None
    return set(route.takes.__struct_fields__) if route.rule == "admin" else set()


async def test_no_route_is_served_that_the_tables_do_not_declare(api: Api) -> None:
    declared = {(route.method, route.path) for route in (*TABLE, *PAGES)}
    served = {
        ("GET" if route.method == "HEAD" else route.method, route.resource.canonical)
        for route in api.client.app.router.routes()
        if route.resource is not None
    }
    assert served == declared
    assert len(declared) == len(TABLE) + len(PAGES)


def test_every_route_says_what_it_does_and_for_whom() -> None:
    for route in TABLE:
        assert route.rule in RULES
        assert re.fullmatch(r"\S.{10,}\.", route.summary), route.path
        assert route.takes is None or route.takes.__struct_config__.forbid_unknown_fields, route.path
        assert route.method != "GET" or not route.takes


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        found = {part["$ref"]} if "$ref" in part else set()
        return found.union(*(references(value) for value in part.values()))
    return set().union(*(references(value) for value in part)) if isinstance(part, list) else set()


async def test_the_description_holds_every_route_and_every_reference(api: Api) -> None:
    status, told = await api.call("GET", "/openapi.json")
    assert (status, told["openapi"]) == (200, "3.1.0")
    for route in TABLE:
        operation = told["paths"][route.path][route.method.lower()]
        assert operation["security"] == ([] if route.rule == "anyone" else [{"bearer": []}, {"apiKey": []}])
        assert ("requestBody" in operation) == (route.takes is not None)
        assert {each["name"] for each in operation["parameters"] if each["in"] == "path"} == set(
            re.findall(r"{(\w+)}", route.path)
        )
    for reference in references(told):
        _, kind, name = reference.removeprefix("#/").split("/")
        assert name in told["components"][kind]
    names = [operation["operationId"] for path in told["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))
    assert told["components"]["schemas"]["Error"]["properties"]["code"]["enum"] == list(CODES)


def test_the_description_says_what_a_query_takes_and_whose_words_a_refusal_is_in() -> None:
    paths = document(TABLE)["paths"]
    taken = {each["name"]: each["schema"]["type"] for each in paths["/api/v1/gpu/instances"]["get"]["parameters"]}
    assert {"limit": "integer", "min_vram": "number", "spot": "boolean", "region": "string"}.items() <= taken.items()
    known = {name for route in TABLE for name in route.query}
    assert known >= set(QUERY_TYPES)
    assert "101" in paths["/ws"]["get"]["responses"]
    assert paths["/api/v1/gpu/proxy"]["post"]["responses"]["default"] == ERROR
    for path in FORWARDED:
        (operation,) = paths[path].values()
        assert "$ref" not in operation["responses"]["default"]  # OpenAI's, Anthropic's, JSON-RPC's or the upstream's


async def test_a_parameter_that_a_route_does_not_know_is_refused_and_named(api: Api) -> None:
    ann = await api.person()
    status, told = await api.call("GET", "/api/v1/gpu/instances?min_vrm=80", None, ann.by_key)
    assert (status, told["code"]) == (422, "UNPROCESSABLE")
    assert told["error"].startswith("no parameter 'min_vrm'; known: provider, min_vram, ")
    assert (await api.call("GET", "/api/v1/gpu/instances?min_vram=80", None, ann.by_key))[0] == 200
    assert (await api.call("GET", "/api/v1/user/profile?_=1", None, ann.by_key))[0] == 200  # it takes none


def test_the_described_envelope_is_the_one_workers_read() -> None:
    described = {field.name: field.required for field in structs.fields(Envelope)}
    assert described == {field.name: field.required for field in structs.fields(envelope.Envelope)}


def test_a_body_forbids_fields_in_the_description_too() -> None:
    schemas = document(TABLE)["components"]["schemas"]
    assert schemas["NewKey"]["additionalProperties"] is False


async def test_the_page_for_people_names_every_route_and_runs_nothing(api: Api) -> None:
    async with api.client.get("/docs") as answer:
        page = await answer.text()
        assert answer.content_type == "text/html"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for route in TABLE:
        assert f"<code>{route.method} {route.path}</code>" in page
    assert not re.search(r"<script|https?://|\bon\w+=", page)
