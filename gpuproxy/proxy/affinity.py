"""What a call is like, as a number: calls with the same number should meet at one endpoint, whose cache knows them.

A session's header says it. Without one the prompt does: its first bytes hold the system prompt and the beginning of
the conversation, which is what prefix caches keep. All workers must agree, so no hash of Python's own will do.
"""

from zlib import crc32

from gpuproxy.proxy.headers import Field

PROMPT_MARKS = (
    b'"messages"',
    b'"prompt"',
    b'"input"',
    b'"inputs"',
)  # where prompts begin in the JSON of inference calls
PROMPT_BYTES = 1_024  # of a prompt that are looked at
SPREAD = 2_654_435_761  # 2^32 / golden ratio: crc32 alone puts similar sessions next to each other


def key_of(fields: list[Field], header: bytes, body: bytes | None) -> int:
    """Return 32 bits that are equal for calls of one session, or of one beginning. `header` is in lower case."""
    size = len(header)
    for name, value in fields:
        if len(name) == size and name.lower() == header:
            return (crc32(value) * SPREAD) & 0xFFFFFFFF
    return (crc32(_prompt(body)) * SPREAD) & 0xFFFFFFFF if body else 0


def _prompt(body: bytes) -> bytes:
    for mark in PROMPT_MARKS:
        at = body.find(mark)
        if at >= 0:
            return body[at : at + PROMPT_BYTES]
    return body[:PROMPT_BYTES]
