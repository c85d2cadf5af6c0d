"""Requests per minute: in no 60 seconds do more than the limit pass."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.ledger.rates import LEASE_NS, MINUTE_NS, Window, share

ASK = st.tuples(
    st.integers(0, 20 * 10**9),  # since the last question
    st.integers(0, 5),  # least
    st.integers(0, 50),  # wanted
    st.floats(0, 1),  # when in the lease all of it is spent
    st.floats(0, 1),  # which part of it comes back unspent
)


@settings(max_examples=300)
@given(st.lists(ASK, max_size=60), st.integers(1, 40))
def test_in_no_minute_more_than_the_limit_pass(asks: list[tuple[int, int, int, float, float]], limit: int) -> None:
    window, now_ns, passed = Window(), 10**15, []
    for number, (pause_ns, least, wanted, when, back) in enumerate(asks):
        now_ns += pause_ns
        entry = window.grant(("w", number), limit, least, wanted, now_ns)
        unspent = int(entry.amount * back)
        passed += [now_ns + int(LEASE_NS * when * 0.999)] * (entry.amount - unspent)
        window.take_back(("w", number), unspent)
    for start_ns in passed:
        assert sum(start_ns <= each_ns < start_ns + MINUTE_NS for each_ns in passed) <= limit


def test_the_whole_limit_can_be_used_at_once() -> None:
    window = Window()
    granted = [window.grant(("w", number), 100, 1, 1, 0).amount for number in range(120)]
    assert sum(granted) == 100
    assert window.left(100, LEASE_NS + MINUTE_NS - 1) == 0
    assert window.left(100, LEASE_NS + MINUTE_NS) == 100
    assert window.is_empty


def test_what_comes_back_can_be_handed_out_again_at_once() -> None:
    window = Window()
    window.grant(("a", 1), 4, 4, 4, 0)
    assert window.grant(("b", 1), 4, 1, 1, 0).amount == 0
    window.take_back(("a", 1), 3)
    window.take_back(("a", 1), 99)
    window.take_back(("x", 1), 99)
    assert window.left(4, 0) == 4


def test_who_may_have_something_left_is_known_while_it_can_be_spent() -> None:
    window = Window()
    window.grant(("a", 1), 10, 1, 1, 0)
    window.grant(("b", 1), 10, 1, 1, 1)
    assert window.holders(2) == {"a", "b"}
    assert window.holders(LEASE_NS) == {"b"}
    assert window.reset_ns(2) == LEASE_NS + MINUTE_NS


def test_shares_shrink_with_what_is_left_down_to_what_is_needed() -> None:
    assert [share(left, 1, 1_000, 8) for left in (80_000, 800, 80, 8, 1, 0)] == [1_000, 100, 10, 1, 1, 0]
    assert (share(5, 6, 10, 8), share(6, 6, 10, 8), share(7, 0, 10, 8)) == (0, 6, 0)
