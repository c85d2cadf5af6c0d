"""The ledger against a plain dictionary: whatever is done in whatever order, both agree."""

import asyncio
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from gpuproxy.access.accounts import create_user
from gpuproxy.errors import GatewayError
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.holds import Hold
from gpuproxy.ledger.transfers import REVENUE, Transfer, credit_account, post
from gpuproxy.ledger.verify import verify
from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import upgrade
from gpuproxy.store.schema import accounts

AMOUNTS = st.integers(1, 60)
EXPIRY = datetime(2030, 1, 1, tzinfo=UTC)


class Books:
    """A store with an event loop of its own, since the machine is not asynchronous."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.store = open_store(url)
        self.runner.run(upgrade(self.store))

    def do(self, work: Callable[..., Any], *words: Any) -> Any:
        """Do `work` in a transaction; None for what the ledger refuses."""

        async def run() -> Any:
            async with self.store.writing() as connection:
                return await connection.run_sync(work, *words)

        try:
            return self.runner.run(run())
        except GatewayError:
            return None

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()


@pytest.fixture
def books(store_url: str) -> Iterator[Books]:
    made = Books(store_url)
    yield made
    made.close()


class Machine(RuleBasedStateMachine):
    """Two customers of their own in each run; the model knows what each has and every hold's parts."""

    books: Books
    made = Bundle("made")

    @initialize()
    def two_customers(self) -> None:
        self.users = []
        for _ in range(2):
            user = self.books.runner.run(create_user(self.books.store, f"{uuid4()}@example.com"))
            self.users.append(user.id)
        self.posted = dict.fromkeys(self.users, 0)
        self.held: dict[str, tuple[str, int]] = {}  # pending: user, remaining
        self.over: set[str] = set()

    def free(self, user_id: str) -> int:
        return self.posted[user_id] - sum(rest for owner, rest in self.held.values() if owner == user_id)

    @rule(at=st.integers(0, 1), amount=AMOUNTS, again=st.booleans())
    def give(self, at: int, amount: int, again: bool) -> None:
        key = str(uuid4())
        for is_new in (True, False)[: 1 + again]:
            done = self.books.runner.run(credit(self.books.store, self.users[at], amount, key))
            assert done is is_new
        self.posted[self.users[at]] += amount

    @rule(at=st.integers(0, 1), amount=AMOUNTS)
    def charge(self, at: int, amount: int) -> None:
        user_id = self.users[at]
        transfer = Transfer(credit_account(user_id), REVENUE, amount, "usage", str(uuid4()))
        if self.books.do(post, [transfer]) is not None:
            assert amount <= self.free(user_id)
            self.posted[user_id] -= amount
        else:
            assert amount > self.free(user_id)

    @rule(target=made, at=st.integers(0, 1), amount=AMOUNTS, again=st.booleans(), ends=st.booleans())
    def place(self, at: int, amount: int, again: bool, ends: bool) -> str:
        user_id = self.users[at]
        words = (user_id, amount, str(uuid4()), "", EXPIRY if ends else None)
        hold: Hold | None = self.books.do(holds.place, *words)
        assert (hold is not None) == (amount <= self.free(user_id))
        if hold is None:
            return ""
        if again:
            assert self.books.do(holds.place, *words).id == hold.id
        self.held[hold.id] = (user_id, amount)
        return hold.id

    @rule(hold_id=made, amount=AMOUNTS)
    def extend(self, hold_id: str, amount: int) -> None:
        done = self.books.do(holds.extend, hold_id, amount)
        if hold_id not in self.held:
            assert done is None
            return
        user_id, rest = self.held[hold_id]
        assert done is (amount <= self.free(user_id))
        if done:
            self.held[hold_id] = (user_id, rest + amount)

    @rule(hold_id=made, amount=AMOUNTS, again=st.booleans())
    def draw(self, hold_id: str, amount: int, again: bool) -> None:
        words = (hold_id, amount, "usage", str(uuid4()))
        done = self.books.do(holds.draw, *words)
        if not self._covers(hold_id, amount):
            assert done is None
            return
        assert done is True
        user_id, rest = self.held[hold_id]
        self.held[hold_id] = (user_id, rest - amount)
        self.posted[user_id] -= amount
        if again and self._covers(hold_id, amount):
            assert self.books.do(holds.draw, *words) is False

    @rule(hold_id=made, amount=AMOUNTS)
    def give_back(self, hold_id: str, amount: int) -> None:
        done = self.books.do(holds.give_back, hold_id, amount)
        if hold_id in self.held:
            user_id, rest = self.held[hold_id]
            assert done == min(amount, rest)
            self.held[hold_id] = (user_id, rest - done)
        else:
            assert done is None

    @rule(hold_id=made, amount=st.integers(0, 60))
    def settle(self, hold_id: str, amount: int) -> None:
        done = self.books.do(holds.settle, hold_id, amount, "usage")
        assert (done is not None) == self._covers(hold_id, amount)
        if done is not None:
            self.posted[self.held.pop(hold_id)[0]] -= amount

    @rule(hold_id=made)
    def void(self, hold_id: str) -> None:
        assert (self.books.do(holds.void, hold_id) is not None) == (hold_id in self.held)
        self.held.pop(hold_id, None)

    @rule(late=st.booleans())
    def expire(self, late: bool) -> None:
        self.books.do(holds.expire, EXPIRY + timedelta(seconds=1 if late else -1))
        if late:
            for hold_id in [hold_id for hold_id in self.held if self.books.do(holds.get, hold_id).state == "expired"]:
                assert self.books.do(holds.get, hold_id).expires_at == EXPIRY
                del self.held[hold_id]

    @invariant()
    def both_agree(self) -> None:
        async def read() -> dict[str, tuple[int, int]]:
            async with self.books.store.reading() as connection:
                rows = await connection.execute(select(accounts).where(accounts.c.owner_user_id.in_(self.users)))
                return {row.owner_user_id: (row.posted_nanousd, row.held_nanousd) for row in rows}

        found = self.books.runner.run(read())
        for user_id in self.users:
            held = sum(rest for owner, rest in self.held.values() if owner == user_id)
            assert found.get(user_id, (0, 0)) == (self.posted[user_id], held)

    def teardown(self) -> None:
        assert self.books.runner.run(verify(self.books.store)) == []

    def _covers(self, hold_id: str, amount: int) -> bool:
        return hold_id in self.held and amount <= self.held[hold_id][1]


def test_the_ledger_agrees_with_a_plain_dictionary(books: Books) -> None:
    machine = type("BoundMachine", (Machine,), {"books": books})
    few = settings(max_examples=25, stateful_step_count=30, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(machine, settings=few)


async def test_money_is_neither_made_nor_lost_by_transfers_at_once(store: Store) -> None:
    chance = random.Random(7)
    people = [(await create_user(store, f"{name}@example.com")).id for name in "abcde"]
    for person in people:
        await credit(store, person, 100, person)
    totals: list[int] = []

    async def pay(number: int) -> None:
        debit, to = chance.sample(people, 2)
        wanted = Transfer(credit_account(debit), credit_account(to), chance.randrange(1, 80), "adjustment", str(number))
        try:
            async with store.writing() as connection:
                await connection.run_sync(post, [wanted])
        except GatewayError as error:
            totals.append(-1 if error.code == "INSUFFICIENT_CREDITS" else 0)

    async def look() -> None:
        async with store.reading() as connection:
            rows = await connection.scalars(select(accounts.c.posted_nanousd).where(accounts.c.kind == "credit"))
            balances = rows.all()
        assert min(balances) >= 0
        totals.append(sum(balances))

    await asyncio.gather(*(look() if number % 4 == 0 else pay(number) for number in range(200)))
    assert set(totals) == {500, -1}
    assert await verify(store) == []
