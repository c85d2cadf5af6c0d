"""What a protocol handler may do about models besides routing by them: give one another name, list them.

Both are optional: a handler that has the method is asked, one that has not is not.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from gpuproxy.plugin.protocol import Call


class ModelOffer(Struct):
    """A model that a caller may use, and its prices in dollars as text, by the names they have in the configuration.

    ``aliases`` are other names that calls may use for it.
    """

    id: str
    prices: Mapping[str, str] = {}
    aliases: tuple[str, ...] = ()


@runtime_checkable
class ModelRenamer(Protocol):
    """A handler whose calls can name a model otherwise at an upstream."""

    def rename(self, call: Call, path: bytes, body: bytes | None, model: str) -> tuple[bytes, bytes | None]:
        """Return path and body with `model` in place of the name in them, and every other byte as it was.

        ``call.body`` is not to be looked at. Raises GatewayError BAD_REQUEST when the name cannot be found.
        """


@runtime_checkable
class ModelLister(Protocol):
    """A handler in whose protocol a caller can ask for the models there are, or what one of them is."""

    def asks_for_models(self, call: Call) -> bool:
        """Tell whether this call, whose intent has no model, asks for the list of them or to be shown one."""

    def list_models(self, call: Call, offers: Sequence[ModelOffer]) -> bytes:
        """Return the JSON that lists or shows. Raises GatewayError: METHOD_NOT_ALLOWED, UNKNOWN_MODEL."""
