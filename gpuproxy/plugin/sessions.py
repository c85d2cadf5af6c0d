"""The door for protocols whose servers remember: which server answered a call, and how a later call gets back to it.

A handler that is an `Attached` is given a `Station` when its worker starts. Where a server's answer names something
that it alone knows (a session, an address), the handler gives `UpstreamRequest.editor` a `HeadEditor`: that is told the
`Pin` of the server that answered and may hand it to the client inside a sealed text. When the client brings the text
back, the handler puts the pin into `Intent.pin`. Then the call goes to that server or to none: no strategy, breaker or
second try moves it. One of another account, and one of a server that is not configured any more, is refused with
SESSION_GONE. No table is kept, so any worker of any node can read what another one has sealed. The target of an
envelope names its server already: there any pin means that no other URL of the upstream may stand in for it.

Calls without a pin or an editor pay nothing for this.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from msgspec import Struct

from gpuproxy.codec.seal import Seal

if TYPE_CHECKING:
    from gpuproxy.plugin.protocol import AnswerEditor, HeaderList

PROXY_PREFIX = b"/api/v1/gpu/proxy"  # below it are all mounts


class Pin(Struct, frozen=True, array_like=True, gc=False):
    """One server, as the base URL `url` of an upstream, and the account whose call it answered.

    With ``is_whole_path`` the call's path is not below that base URL but all of the path there.
    """

    account: str
    upstream: str
    url: str
    is_whole_path: bool = False


class HeadEditor(Protocol):
    """Changes the head of an answer on its way to the client. Called once, and not for answers that are retried."""

    def edit_head(self, status: int, fields: "HeaderList", pin: Pin) -> "tuple[HeaderList, AnswerEditor | None]":
        """Return the fields for the client, and who edits the body if that is a stream of events of status 200.

        `fields` are the end-to-end ones and must not be changed in place; returning them as they are costs nothing.
        """


class Station(Struct, frozen=True):
    """What a worker lends to handlers: ``seal`` is the same in all workers, on all nodes and over restarts.

    ``public_url`` is what the configuration says of it, may be empty; ``public_origin`` its origin. ``is_local`` tells
    that the gateway listens for its own machine only. The others are as ``[mcp]`` has them.
    """

    seal: Seal
    public_url: str = ""
    public_origin: str = ""
    is_local: bool = False
    allowed_origins: tuple[str, ...] = ()
    authorization_servers: tuple[str, ...] = ()


@runtime_checkable
class Attached(Protocol):
    """A handler that needs something of the worker it runs in."""

    def attach(self, station: Station) -> None:
        """Keep the station; called before the first call."""
