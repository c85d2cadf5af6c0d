"""Money over HTTP: exact on the way in and out, added once, by admins only."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from sqlalchemy import func, select, update

from gpuproxy.access.idempotency import KEPT
from gpuproxy.control.money import nanousd_given, usd
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import AMOUNT_NANOUSD_MAX, credit
from gpuproxy.ledger.holds import place
from gpuproxy.ledger.statement import credits_of
from gpuproxy.ledger.verify import verify
from gpuproxy.store.schema import accounts, audit, events, idempotency

from .conftest import Api, Person

ADD = "/api/v1/admin/credits/add"
TAKE = "/api/v1/admin/credits/take"
CREDITS = "/api/v1/user/credits"
TRANSACTIONS = "/api/v1/user/transactions"


def exactly(body: bytes) -> Any:
    """Decode without making a float of a number."""
    return json.loads(body, parse_float=Decimal)


@given(st.integers(-AMOUNT_NANOUSD_MAX, AMOUNT_NANOUSD_MAX))
def test_an_amount_is_shown_as_the_number_that_equals_it(nanousd: int) -> None:
    assert exactly(bytes(usd(nanousd))) * 10**9 == nanousd


@given(st.integers(1, AMOUNT_NANOUSD_MAX), st.booleans(), st.integers(0, 4))
def test_an_amount_is_read_exactly_as_number_and_as_text(nanousd: int, is_text: bool, zeros: int) -> None:
    written = f"{Decimal(nanousd).scaleb(-9):f}"
    written += "0" * zeros if "." in written else ""
    assert nanousd_given(Raw((f'"{written}"' if is_text else written).encode()), "amount") == nanousd


@given(st.decimals(allow_nan=True, allow_infinity=True), st.booleans())
def test_whatever_is_given_is_read_exactly_or_refused(amount: Decimal, is_text: bool) -> None:
    written = f'"{amount}"' if is_text else str(amount)
    try:
        nanousd = nanousd_given(Raw(written.encode()), "amount")
    except GatewayError:
        return
    assert Decimal(nanousd) == amount * 10**9


BAD = (b"true", b"null", b"[1]", b"{}", b'"x"', b'""', b'"1_0"', b'" 1"', b'"+1"', b"0", b"-1", b"1e-10", b"1e10")


def gift(person: Person, amount: bytes) -> bytes:
    return b'{"user_id": "%s", "amount": %s}' % (person.id.encode(), amount)


async def test_what_is_no_amount_is_refused_by_name(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    for amount in BAD:
        status, told = await api.call("POST", ADD, gift(person, amount), admin.by_token)
        assert (status in (400, 422), told["error"].startswith("amount: ")) == (True, True), told
    assert (await credits_of(api.store, person.id)).total_nanousd == 0


async def test_the_guides_call_adds_credit(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    for count, amount in enumerate((b"100.00", b'"100.00"', b"1e2"), 1):
        status, told = await api.call("POST", ADD, gift(person, amount), admin.by_token)
        assert (status, told["amount"], told["credits_remaining_nanousd"]) == (200, 100, count * 100 * 10**9)
    status, told = await api.call("GET", CREDITS, headers=person.by_key)
    assert (status, told["credits_remaining"], told["credits_total"]) == (200, 300, 300)


async def test_credit_for_nobody_known_is_refused(api: Api) -> None:
    admin = await api.person(is_admin=True)
    for unknown in ("nobody", admin.email):
        status, told = await api.call("POST", ADD, {"user_id": unknown, "amount": 1}, admin.by_token)
        assert (status, told["error"]) == (404, f"no user {unknown!r}")


async def test_an_account_is_shown_to_the_nanodollar(api: Api) -> None:
    person = await api.person()
    await credit(api.store, person.id, 8_999_999_999_999_999, "one")
    async with api.store.writing() as connection:
        await connection.run_sync(place, person.id, 3, "hold")
    async with api.client.get(CREDITS, headers=person.by_token) as answer:
        told = exactly(await answer.read())
    assert told["credits_remaining"] == Decimal("8999999.999999996")
    assert (told["credits_total"], told["held"]) == (Decimal("8999999.999999999"), Decimal("0.000000003"))
    assert (told["credits_remaining_nanousd"], told["held_nanousd"]) == (8_999_999_999_999_996, 3)


async def test_overage_is_how_far_an_account_is_below_nothing(api: Api) -> None:
    person = await api.person()
    await credit(api.store, person.id, 5, "one")
    async with api.store.writing() as connection:
        await connection.execute(update(accounts).where(accounts.c.kind == "credit").values(overdraft_nanousd=10))
        await connection.run_sync(place, person.id, 12, "hold")
    _, told = await api.call("GET", CREDITS, headers=person.by_token)
    assert (told["credits_remaining_nanousd"], told["overage_nanousd"], told["cap_nanousd"]) == (-7, 7, 10)


async def test_who_never_had_credit_has_nothing(api: Api) -> None:
    person = await api.person()
    _, told = await api.call("GET", CREDITS, headers=person.by_token)
    assert (told["credits_remaining"], told["auto_renew"]) == (0, False)
    assert (await api.call("GET", TRANSACTIONS, headers=person.by_token))[1]["data"] == []


async def added(api: Api, admin: Person, person: Person, key: str) -> tuple[int, Any]:
    body = {"user_id": person.id, "amount": 1}
    return await api.call("POST", ADD, body, admin.by_token | {"Idempotency-Key": key})


async def test_a_repeated_call_adds_once_even_after_the_answer_is_forgotten(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    assert await added(api, admin, person, "one") == await added(api, admin, person, "one")
    async with api.store.writing() as connection:
        await connection.execute(update(idempotency).values(created_at=datetime.now(UTC) - KEPT))
    assert (await added(api, admin, person, "one"))[0] == 409
    assert (await added(api, admin, person, "two"))[0] == 200
    assert (await credits_of(api.store, person.id)).total_nanousd == 2 * 10**9


async def test_credit_added_by_mistake_is_taken_back_but_no_more_than_there_is(api: Api) -> None:
    ann, admin = await api.person(), await api.person(is_admin=True)
    await api.call("POST", ADD, {"user_id": ann.id, "amount": 100}, admin.by_token)
    once = {**admin.by_token, "Idempotency-Key": "back"}
    for _ in range(2):
        status, told = await api.call("POST", TAKE, {"user_id": ann.id, "amount": "90.5"}, once)
        assert (status, told["amount"], told["credits_remaining"]) == (200, 90.5, 9.5)
    status, told = await api.call("POST", TAKE, {"user_id": ann.id, "amount": 10}, admin.by_token)
    assert (status, told["code"]) == (402, "INSUFFICIENT_CREDITS")
    _, told = await api.call("GET", "/api/v1/user/transactions", None, ann.by_token)
    assert [(each["kind"], each["amount"]) for each in told["data"]] == [("adjustment", -90.5), ("adjustment", 100)]
    assert await verify(api.store) == []


async def test_credit_is_added_with_a_note_and_an_event(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    _, told = await added(api, admin, person, "one")
    async with api.store.reading() as connection:
        row = (await connection.execute(select(audit))).one()
        assert await connection.scalar(select(func.count()).select_from(audit)) == 1
        event = (await connection.execute(select(events.c.name, events.c.user_id, events.c.data))).one()
    assert (row.actor_user_id, row.action, row.subject_id) == (admin.id, "credits.add", person.id)
    assert row.detail == {"amount_usd": "1.00", "transaction_id": told["transaction_id"]}
    assert (event.name, event.user_id, event.data["amount_nanousd"]) == ("credits.added", person.id, 10**9)


async def test_transactions_come_in_pages_newest_first(api: Api) -> None:
    person = await api.person()
    for index in range(3):
        await credit(api.store, person.id, index + 1, str(index))
    _, first = await api.call("GET", f"{TRANSACTIONS}?limit=2", headers=person.by_token)
    assert [each["amount_nanousd"] for each in first["data"]] == [3, 2]
    _, last = await api.call("GET", f"{TRANSACTIONS}?limit=2&cursor={first['next_cursor']}", headers=person.by_token)
    assert ([each["amount_nanousd"] for each in last["data"]], "next_cursor" in last) == ([1], False)


async def test_a_customer_says_below_what_they_want_to_be_told(api: Api) -> None:
    ann, low = await api.person(), "/api/v1/user/credits/low"
    for wished, shown in ((5, 5.0), (0, 0.0), (None, 1.0)):
        status, told = await api.call("PUT", low, {"threshold": wished}, ann.by_token)
        assert (status, told["low_threshold"]) == (200, shown)
        _, told = await api.call("GET", "/api/v1/user/credits", None, ann.by_token)
        assert told["low_threshold"] == shown
    for wished in (-1, "x", [1]):
        assert (await api.call("PUT", low, {"threshold": wished}, ann.by_token))[0] in (400, 422)
