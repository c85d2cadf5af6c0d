"""The door for protocols that have a say before a caller is known, and when the gateway itself refuses a call.

Browsers ask before they send a key whether they may (CORS), and clients that have none want to be told where to get
one (RFC 9728). Only calls that bring no credential, or are refused, meet this.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from msgspec import Struct

from gpuproxy.errors import GatewayError

if TYPE_CHECKING:
    from gpuproxy.plugin.protocol import HeaderList


class Visit(Struct, frozen=True):
    """A call before anything is known of its caller.

    ``target`` is the whole request target, ``headers`` are the client's end-to-end fields, ``base_url`` is how the
    client reaches the gateway.
    """

    method: bytes
    target: bytes
    headers: "HeaderList"
    base_url: str


@runtime_checkable
class Receptionist(Protocol):
    """A handler that receives visitors."""

    def greet(self, visit: Visit) -> "HeaderList | None":
        """Answer a call without a credential: fields of a 204, None to ask for a credential. Raises GatewayError."""

    def refusal_fields(self, visit: Visit, error: GatewayError) -> "HeaderList":
        """Return fields for a refusal; they take the place of the gateway's own ones of the same name."""
