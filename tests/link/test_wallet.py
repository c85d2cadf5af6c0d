"""A worker's wallet: spends what it holds, asks for what it lacks, and never spends a slip twice."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpuproxy.link.wallet import Wallet

SECOND_NS = 10**9


class Till:
    """A wallet and what it said."""

    def __init__(self) -> None:
        self.asked: deque[tuple[int, int]] = deque()
        self.given: list[tuple[int, int]] = []
        self.told: list[tuple[int, str]] = []
        self.wallet = Wallet(lambda *words: self.asked.append(words), lambda *words: self.given.append(words))
        self.now_ns = 0

    def take(self, amount: int, number: int = 0) -> bool:
        return self.wallet.take(amount, self.now_ns, lambda outcome: self.told.append((number, outcome)))

    def refill(self, amount: int, lease_id: int = 1, until_ns: int = 0) -> None:
        self.wallet.refill(lease_id, amount, until_ns, self.now_ns)


@pytest.fixture
def till() -> Till:
    return Till()


def test_the_first_call_asks_for_what_it_needs_and_waits(till: Till) -> None:
    assert till.take(5, 1) is False
    assert list(till.asked) == [(5, 5)]
    till.refill(20)
    assert (till.told, till.wallet.rest, till.wallet.reserved) == ([(1, "taken")], 15, 5)


def test_what_is_held_is_taken_without_a_question(till: Till) -> None:
    till.take(1)
    till.refill(100)
    till.asked.clear()
    assert [till.take(1) for _ in range(49)] == [True] * 49
    assert not till.asked


def test_more_is_asked_for_before_it_runs_out(till: Till) -> None:
    till.take(1)
    till.refill(100)
    for _ in range(50):
        assert till.take(1) is True
    assert list(till.asked)[1:] == [(0, 102)]
    till.refill(0)
    assert till.take(1) is True
    assert len(till.asked) == 2


def test_one_question_serves_all_who_wait(till: Till) -> None:
    assert [till.take(5, number) for number in range(3)] == [False] * 3
    assert list(till.asked) == [(5, 5)]
    till.refill(7)
    assert till.told == [(0, "taken")]
    assert till.given == [(1, 2)]
    assert list(till.asked)[1:] == [(5, 10)]
    till.refill(10)
    assert till.told == [(number, "taken") for number in range(3)]


def test_a_refusal_is_for_all_who_lack_as_much(till: Till) -> None:
    for number, amount in enumerate((5, 6, 4)):
        till.take(amount, number)
    till.refill(0)
    assert till.told == [(0, "refused"), (1, "refused")]
    assert list(till.asked)[1:] == [(4, 4)]
    till.refill(0)
    assert till.told[2:] == [(2, "refused")]


def test_a_wallet_lays_what_it_holds_before_control_and_asks_for_the_whole(till: Till) -> None:
    till.take(1)
    till.refill(4)
    till.take(5, 1)
    assert till.given == [(1, 3)]
    assert till.asked[-1][0] == 5


def test_what_a_call_did_not_use_serves_the_next_in_line(till: Till) -> None:
    till.take(5, 1)
    till.refill(5)
    till.take(3, 2)
    till.wallet.settle(5, 1, 0)
    assert (till.told, till.wallet.rest, till.wallet.reserved) == ([(1, "taken"), (2, "taken")], 1, 3)


def test_a_call_that_used_more_takes_it_from_the_rest_as_far_as_it_goes(till: Till) -> None:
    till.take(5)
    till.refill(7)
    till.wallet.settle(5, 9, 0)
    assert (till.wallet.rest, till.wallet.reserved) == (0, 0)


def test_who_cannot_be_told_is_told_so(till: Till) -> None:
    till.take(5, 1)
    till.wallet.fail()
    assert till.told == [(1, "unknown")]
    till.take(5, 2)
    assert len(till.asked) == 2


def test_a_slip_is_not_spent_after_its_time_and_goes_back(till: Till) -> None:
    till.take(1)
    till.refill(10, 7, SECOND_NS)
    till.now_ns = SECOND_NS
    assert till.take(1) is False
    assert till.given == [(7, 9)]


def test_the_slip_that_ends_first_is_spent_first(till: Till) -> None:
    till.take(1)
    till.refill(10, 1, 2 * SECOND_NS)
    till.take(5)
    till.refill(10, 2, SECOND_NS)
    till.take(6)
    till.now_ns = SECOND_NS
    till.wallet.sweep(till.now_ns)
    assert (till.given, till.wallet.rest) == ([(2, 4)], 4)


def test_everything_goes_back_when_nothing_was_taken_for_a_while(till: Till) -> None:
    till.take(1)
    till.refill(10)
    till.wallet.sweep(0)
    assert till.given == []
    till.wallet.sweep(0)
    assert till.given == [(1, 9)]
    assert not till.wallet.is_empty
    till.wallet.settle(1, 1, 0)
    assert till.wallet.is_empty


def test_a_recall_gives_all_that_is_not_reserved(till: Till) -> None:
    till.take(1)
    till.refill(10)
    assert till.wallet.recall(0) == 9
    assert till.given == [(1, 9)]
    assert till.wallet.recall(0) == 0


def test_a_closed_wallet_refuses_and_gives_back(till: Till) -> None:
    till.take(1)
    till.refill(10)
    till.take(99, 2)
    till.wallet.close(0)
    assert till.told[-1] == (2, "refused")
    assert till.given == [(1, 9)]


class Market(RuleBasedStateMachine):
    """Three wallets and a control that hands out what is left: nothing is made, lost or refused without need."""

    def __init__(self) -> None:
        super().__init__()
        self.tills = [Till() for _ in range(3)]
        self.free = 1_000
        self.spent = 0
        self.open: list[tuple[int, int]] = []  # till, amount
        self.called = self.taken = self.refused = 0

    tills_ = st.integers(0, 2)

    @rule(at=tills_, amount=st.integers(0, 200))
    def call(self, at: int, amount: int) -> None:
        till = self.tills[at]
        self.called += 1

        def told(outcome: str) -> None:
            if outcome == "taken":
                self.open.append((at, amount))
                self.taken += 1
            else:
                self.refused += 1

        if till.wallet.take(amount, 0, told):
            told("taken")

    @rule(at=tills_, part=st.integers(1, 4))
    def answer(self, at: int, part: int) -> None:
        till = self.tills[at]
        self.collect(till)
        if not till.asked:
            return
        least, wanted = till.asked.popleft()
        if least > self.free:
            for other in self.tills:
                if other is not till:
                    other.wallet.recall(0)
                    self.collect(other)
        amount = 0 if least > self.free else max(least, min(wanted, self.free // part))
        self.free -= amount
        assert amount >= 0
        till.wallet.refill(0, amount, 0, 0)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if not self.open:
            return
        at, reserved = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        used = data.draw(st.integers(0, reserved))
        self.spent += used
        self.tills[at].wallet.settle(reserved, used, 0)

    @rule(at=tills_)
    def sweep(self, at: int) -> None:
        self.tills[at].wallet.sweep(0)
        self.collect(self.tills[at])

    def collect(self, till: Till) -> None:
        self.free += sum(amount for _, amount in till.given)
        till.given.clear()

    @invariant()
    def nothing_is_made_or_lost(self) -> None:
        held = sum(till.wallet.rest + till.wallet.reserved for till in self.tills)
        held += sum(amount for till in self.tills for _, amount in till.given)
        assert self.free + held + self.spent == 1_000
        assert sum(reserved for _, reserved in self.open) == sum(till.wallet.reserved for till in self.tills)
        assert min(till.wallet.rest for till in self.tills) >= 0

    def teardown(self) -> None:
        for _ in range(1_000):
            for at in range(3):
                self.answer(at, 1)
        assert self.called == self.taken + self.refused


TestMarket = Market.TestCase
TestMarket.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.integers(0, 2), min_size=100, max_size=100), st.integers(0, 30))
def test_money_for_ten_lets_exactly_ten_of_a_hundred_pass(order: list[int], pause: int) -> None:
    market = Market()
    market.free = 10 * 7 + 6
    for number, at in enumerate(order):
        market.call(at, 7)
        if pause and number % pause == 0:
            market.answer(at, 2)
    for _ in range(200):
        for at in range(3):
            market.answer(at, 1)
    assert (market.taken, market.refused) == (10, 90)
