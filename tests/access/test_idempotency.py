"""A repeated call happens once."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import false, func, select, update

from gpuproxy.access.accounts import create_user
from gpuproxy.access.idempotency import KEPT, RUNNING_MAX, Claim, Reply, abandon, begin, claim_of, finish
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import idempotency

REPLY = Reply(201, b'{"id":"1"}')


@pytest.fixture
async def claim(store: Store) -> Claim:
    return claim_of((await create_user(store, "ann@example.com")).id, "POST /keys", "one", b"{}")


async def finished(store: Store, claim: Claim) -> None:
    assert await begin(store, claim) is None
    async with store.writing() as connection:
        await finish(connection, claim, REPLY)


async def passed(store: Store, time: timedelta) -> None:
    """Let time pass for all claims."""
    async with store.writing() as connection:
        await connection.execute(update(idempotency).values(created_at=datetime.now(UTC) - time))


async def test_a_repetition_gets_the_first_reply(store: Store, claim: Claim) -> None:
    await finished(store, claim)
    assert [await begin(store, claim) for _ in range(2)] == [REPLY, REPLY]


async def test_a_repetition_while_the_first_runs_is_told_to_wait(store: Store, claim: Claim) -> None:
    assert await begin(store, claim) is None
    with pytest.raises(GatewayError, match="still runs") as caught:
        await begin(store, claim)
    assert (caught.value.code, caught.value.retry_after_s) == ("CONFLICT", 1)


async def test_another_request_under_the_same_key_is_refused(store: Store, claim: Claim) -> None:
    await finished(store, claim)
    with pytest.raises(GatewayError, match="'one' was used for another request") as caught:
        await begin(store, claim_of(claim.user_id, claim.route, claim.key, b'{"name":"x"}'))
    assert caught.value.code == "UNPROCESSABLE"


async def test_a_key_is_one_users_on_one_route(store: Store, claim: Claim) -> None:
    await finished(store, claim)
    other = await create_user(store, "bob@example.com")
    assert await begin(store, claim_of(other.id, claim.route, claim.key, b"{}")) is None
    assert await begin(store, claim_of(claim.user_id, "POST /other", claim.key, b"{}")) is None


async def test_of_racing_calls_one_goes_on(store: Store, claim: Claim) -> None:
    tried = await asyncio.gather(*(begin(store, claim) for _ in range(8)), return_exceptions=True)
    assert [each for each in tried if not isinstance(each, GatewayError)] == [None]


async def test_a_call_that_did_nothing_gives_its_key_back(store: Store, claim: Claim) -> None:
    assert await begin(store, claim) is None
    await abandon(store, claim)
    assert await begin(store, claim) is None


async def test_a_key_that_is_given_back_meanwhile_can_be_tried_again(
    store: Store, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "insert_new", lambda table: update(table).where(false()))  # it was there at that moment
    with pytest.raises(GatewayError, match="still runs") as caught:
        await begin(store, claim)
    assert (caught.value.code, caught.value.retry_after_s) == ("CONFLICT", 1)


async def test_a_reply_is_not_abandoned(store: Store, claim: Claim) -> None:
    await finished(store, claim)
    await abandon(store, claim)
    assert await begin(store, claim) == REPLY


async def test_the_claim_of_a_process_that_died_is_taken_over_and_lost_to_it(store: Store, claim: Claim) -> None:
    assert await begin(store, claim) is None
    await passed(store, RUNNING_MAX)
    await finished(store, claim)
    with pytest.raises(GatewayError, match="took too long"):
        async with store.writing() as connection:
            await finish(connection, claim, REPLY)


async def test_a_reply_is_kept_a_day(store: Store, claim: Claim) -> None:
    await finished(store, claim)
    await passed(store, KEPT - timedelta(seconds=5))
    assert await begin(store, claim) == REPLY
    await passed(store, KEPT)
    assert await begin(store, claim_of(claim.user_id, "POST /other", "two", b"")) is None
    async with store.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(idempotency)) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "ä", "a\nb"])
async def test_a_key_is_short_and_plain(key: str) -> None:
    with pytest.raises(GatewayError) as caught:
        claim_of("user", "route", key, b"")
    assert caught.value.code == "BAD_REQUEST"
