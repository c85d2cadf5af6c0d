"""MCP sessions and addresses as clients hold them: sealed texts that name the server which made them.

An MCP server makes up the id of a session after the gateway has chosen it, so no hash of the id can lead back there;
and a table would have to be shared by all workers of all nodes. So the client gets, instead of the server's id, a text
that only the gateway can read: account, upstream, base URL and the server's own id (MCP 2025-11-25, Transports, Session
Management: any visible ASCII). The same is done with addresses that a server names (2024-11-05, HTTP with SSE).

Servers with one URL are no exception: what is sealed names the account too, so nobody can use another one's session,
and adding a URL ends no session.
"""

import msgspec

from gpuproxy.plugin import GatewayError, Pin, Seal

KNOWN_MAX = 4_096  # texts remembered, of about 700 bytes each; reading one anew costs 4 µs
_SESSION, _ADDRESS = b"mcp session", b"mcp address"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[Pin, bytes]).decode


class Sealed:
    """Makes and reads these texts. Reading one twice costs a dict look-up."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self._known: dict[tuple[bytes, bytes], tuple[Pin, bytes]] = {}

    def prepare(self) -> None:
        """See to it that texts can be made. Raises GatewayError UNAVAILABLE."""
        self._seal.warm()

    def session(self, pin: Pin, server_id: bytes) -> bytes:
        """Return the client's id for a session that the server at `pin` calls `server_id`."""
        return self._seal.seal(_encode((pin, server_id)), _SESSION)

    def address(self, pin: Pin, target: bytes) -> bytes:
        """Return the text for the path and query `target` at the server at `pin`."""
        whole = Pin(pin.account, pin.upstream, pin.url, is_whole_path=True)
        return self._seal.seal(_encode((whole, target)), _ADDRESS)

    def read_session(self, text: bytes) -> tuple[Pin, bytes]:
        """Return what `session` was given. Raises GatewayError SESSION_GONE for what it has not made."""
        return self._read(text, _SESSION)

    def read_address(self, text: bytes) -> tuple[Pin, bytes]:
        """Return what `address` was given. Raises GatewayError SESSION_GONE for what it has not made."""
        return self._read(text, _ADDRESS)

    def _read(self, text: bytes, kind: bytes) -> tuple[Pin, bytes]:
        found = self._known.get((kind, text))
        if found is not None:
            return found
        plain = self._seal.unseal(text, kind)
        if plain is None:
            raise GatewayError("SESSION_GONE", "this session is unknown here; begin a new one")
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        found = self._known[kind, text] = _decode(plain)
        return found
