"""Rules that say which MCP tools a key may use: ``server/tool``, where ``*`` stands for any text within its half.

The server is an upstream's name, or the host of a target that is none.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

RULES_MAX = 256  # of one key
RULE_CHARACTERS_MAX = 256
EVERY = "*/*"

_SHAPE = re.compile(r"[A-Za-z0-9._:*-]+/[!-~]+")

MayUse = Callable[[str, str], bool]  # server, tool


def is_rule(text: str) -> bool:
    """Tell whether this is a rule."""
    return len(text) <= RULE_CHARACTERS_MAX and _SHAPE.fullmatch(text) is not None


@lru_cache(maxsize=128)  # of 250 kB at most
def may_use(rules: tuple[str, ...]) -> MayUse:
    """Return what tells whether rules allow a tool of a server; remembered, for the same keys call again."""
    halves = [tuple(half.split("*") for half in rule.split("/", 1)) for rule in rules]

    def allowed(server: str, tool: str) -> bool:
        return any(_matches(of_server, server) and _matches(of_tool, tool) for of_server, of_tool in halves)

    return allowed


def covers(rules: Iterable[str], narrower: str) -> bool:
    """Tell whether one of the rules allows all that `narrower` does. A star there is met by a star only."""
    server, _, tool = narrower.partition("/")
    return may_use(tuple(rules))(server, tool)


def _matches(parts: list[str], text: str) -> bool:
    """Tell whether the text has the parts in their order, the first at its begin and the last at its end.

    No regular expression: with many stars one could be made to try for hours.
    """
    first, *rest = parts
    if not rest:
        return text == first
    last = rest.pop()
    at, end = len(first), len(text) - len(last)
    if not text.startswith(first) or at > end or not text.endswith(last):
        return False
    for part in rest:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
