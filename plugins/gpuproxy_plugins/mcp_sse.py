"""The first event of an HTTP+SSE stream (MCP 2024-11-05): the address the client shall post to.

The server makes it up, so it leads past the gateway. Its value is replaced; every other byte of the stream passes as
it came. Only the beginning is held back, up to the end of the first event.
"""

import re
from collections.abc import Callable

HELD_BYTES_MAX = 65_536  # an address is shorter; a first event over this passes as it is
_END = rb"(?:\r\n|\n|\r(?!\n))"  # of a line; WHATWG HTML, Server-sent events, parsing
_EVENT_END = re.compile(_END + _END)
_NAME = re.compile(rb"(?:\A|\r|\n)event: ?([^\r\n]*)")
_DATA = re.compile(rb"(?:\A|\r|\n)data: ?([^\r\n]*)")
_FIELD = re.compile(rb"(?:\A|\r|\n)(?:event|data|id|retry)(?=[:\r\n])")


class EndpointEditor:
    """Puts `rewrite(address)` in the place of the address in the first event, if that is an endpoint event."""

    def __init__(self, rewrite: Callable[[bytes], bytes]) -> None:
        self._rewrite = rewrite
        self._held = b""
        self._is_over = False

    def edit(self, data: bytes, is_last: bool) -> bytes:
        """Return what may be sent: nothing until the first event is whole."""
        if self._is_over:
            return data
        held = self._held + data
        done = b""
        while (end := _EVENT_END.search(held)) is not None:
            block, held = held[: end.end()], held[end.end() :]
            if _FIELD.search(block) is not None:
                return self._finish(done + self._edited(block) + held)
            done += block  # comments only: no event yet
        if is_last or len(held) > HELD_BYTES_MAX:
            return self._finish(done + held)
        self._held = held
        return done

    def _finish(self, data: bytes) -> bytes:
        self._is_over = True
        self._held = b""
        return data

    def _edited(self, event: bytes) -> bytes:
        name = _NAME.search(event)
        addresses = list(_DATA.finditer(event))
        if name is None or name[1] != b"endpoint" or len(addresses) != 1:
            return event
        found = addresses[0]
        return event[: found.start(1)] + self._rewrite(found[1]) + event[found.end(1) :]
