"""The integration guide as its readers have it, and the code in it."""

import re
from pathlib import Path
from typing import NamedTuple

GUIDE = (Path(__file__).parent / "samples" / "integration.md").read_text()
RUNNABLE = ("python", "javascript", "bash", "sql")
PRINTED_HOST = "localhost:8080"

_PIECES = re.compile(r"^#{2,} (?P<heading>[^\n]+)$|^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Code as it is printed, and the heading it stands under."""

    heading: str
    language: str
    code: str


def _blocks() -> list[Block]:
    found, heading = [], ""
    for piece in _PIECES.finditer(GUIDE):
        heading = piece["heading"] or heading
        if piece["language"] in RUNNABLE:
            found.append(Block(heading, piece["language"], piece["code"]))
    return found


BLOCKS = _blocks()


def sample(heading: str) -> str:
    """Return the code under `heading`."""
    (code,) = [block.code for block in BLOCKS if block.heading == heading]
    return code


def filled(code: str, host: str, **words: str) -> str:
    """Return code with the address, and what the guide leaves to its reader, put in; all must be there."""
    for printed, here in ((PRINTED_HOST, host), *words.items()):
        assert printed in code, f"the guide does not print {printed!r} here"
        code = code.replace(printed, here)
    return code
