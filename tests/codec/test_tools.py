"""Rules of tools: what they allow, and that what covers another allows all it does."""

import fnmatch
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.codec.tools import EVERY, RULE_CHARACTERS_MAX, RULES_MAX, covers, is_rule, may_use


@pytest.mark.parametrize(
    ("rule", "server", "tool", "is_allowed"),
    [
        ("web/search", "web", "search", True),
        ("web/search", "web", "search2", False),
        ("web/search", "web2", "search", False),
        ("web/search", "web", "Search", False),
        ("web/*", "web", "any/thing", True),
        ("*/search", "web", "search", True),
        ("web*/read_*", "web-2", "read_file", True),
        ("web*/read_*", "web-2", "write_read_file", False),
        ("*/x", "a", "b/x", False),
        ("a.b/x", "axb", "x", False),
        ("web/*", "web", "line\nbreak", True),
        (EVERY, "", "", True),
    ],
)
def test_a_star_is_any_text_within_its_half(rule: str, server: str, tool: str, is_allowed: bool) -> None:
    assert may_use((rule,))(server, tool) is is_allowed


def test_one_rule_that_allows_is_enough() -> None:
    allowed = may_use(("a/x", "b/y"))
    assert [allowed(*place) for place in (("a", "x"), ("b", "y"), ("a", "y"))] == [True, True, False]


@pytest.mark.parametrize("text", ["", "web", "web/", "/x", "a b/x", "web/a b", "wéb/x", "a/" + "x" * 255])
def test_what_is_no_rule(text: str) -> None:
    assert not is_rule(text)


def test_many_stars_do_not_slow_a_worker_down() -> None:
    rule = "a/" + "a*" * 100 + "b"
    assert not may_use((rule,))("a", "a" * 1_000_000)


HALVES = st.text(alphabet="ab*", min_size=1, max_size=5)
RULES = st.builds("{}/{}".format, HALVES, HALVES)


def filled(data: st.DataObject, rule: str, alphabet: str) -> str:
    """Return the rule with a text in the place of each star."""
    return "".join(data.draw(st.text(alphabet, max_size=3)) if each == "*" else each for each in rule)


@given(RULES, st.data())
def test_what_covers_a_rule_allows_all_it_does(wider: str, data: st.DataObject) -> None:
    narrower = filled(data, wider, "ab*")
    server, tool = filled(data, narrower, "ab").split("/")
    assert covers((wider,), narrower)
    assert may_use((wider,))(server, tool)


@given(RULES, RULES, st.data())
def test_a_rule_that_is_not_covered_may_allow_more_but_one_that_is_never_does(
    wider: str, narrower: str, data: st.DataObject
) -> None:
    server, tool = filled(data, narrower, "ab").split("/")
    assert may_use((narrower,))(server, tool)
    if covers((wider,), narrower):
        assert may_use((wider,))(server, tool)


@given(HALVES, st.text(alphabet="ab", max_size=6))
def test_a_match_is_what_a_pattern_of_the_shell_matches(half: str, text: str) -> None:
    assert may_use((f"a/{half}",))("a", text) is fnmatch.fnmatchcase(text, half)


@given(RULES)
def test_a_rule_covers_itself_and_every_tool_covers_any_rule(rule: str) -> None:
    assert re.fullmatch(r"[ab*]+/[ab*]+", rule)
    assert covers((rule,), rule)
    assert covers((EVERY,), rule)


def test_the_longest_rules_of_many_keys_do_not_fill_the_memory() -> None:
    rule = "s/" + "t" * (RULE_CHARACTERS_MAX - 8)
    tracemalloc.start()
    try:
        for key in range(200):
            may_use(tuple(f"{rule}{key:03}{number:03}" for number in range(RULES_MAX)))
        assert tracemalloc.get_traced_memory()[0] < 40 << 20
    finally:
        tracemalloc.stop()
