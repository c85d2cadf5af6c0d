"""Calls that belong to one server, and heads that handlers edit: the worker's side of `gpuproxy.plugin.sessions`."""

import contextlib
from typing import TYPE_CHECKING, cast

from gpuproxy.codec.base_url import origin_of
from gpuproxy.codec.seal import Seal
from gpuproxy.config import Config
from gpuproxy.errors import GatewayError
from gpuproxy.plugin import AnswerEditor, Attached, HeadEditor, Pin, Registry, Station
from gpuproxy.proxy.headers import join_fields
from gpuproxy.proxy.heads import AnswerHead, status_line
from gpuproxy.types import Grant

if TYPE_CHECKING:
    from gpuproxy.proxy.destination import Destination
    from gpuproxy.proxy.endpoint import Endpoint
    from gpuproxy.proxy.route import Router


def attach(registry: Registry, config: Config) -> Seal:
    """Return a seal, which all handlers that want one have got."""
    seal = Seal()
    url = config.server.public_url
    mcp = config.mcp
    station = Station(seal, url, origin_of(url), config.server.is_local, mcp.allowed_origins, mcp.authorization_servers)
    for handler in registry.protocols.values():
        if isinstance(handler, Attached):
            handler.attach(station)
    return seal


def warm_up(seal: Seal, router: "Router") -> None:
    """Get the seal ready if an upstream may need it."""
    if any(isinstance(destination.handler, Attached) for destination in router.upstreams.values()):
        with contextlib.suppress(GatewayError):  # control is away, so no key is known either
            seal.warm()


def pinned(router: "Router", destination: "Destination", pin: Pin, grant: Grant | None) -> "Destination":
    """Return `destination` with the pin's server only. Raises GatewayError SESSION_GONE."""
    is_own = grant is not None and pin.account == grant.user_id and pin.upstream == destination.upstream
    found = router.pinned(destination, pin) if is_own else None
    if found is None:
        raise GatewayError("SESSION_GONE", "this session is unknown here; begin a new one")
    return found


def edited(
    editor: AnswerEditor | HeadEditor, head: AnswerHead, grant: Grant | None, endpoint: "Endpoint | None"
) -> tuple[bytes, AnswerEditor | None]:
    """Return the head's first lines as they go to the client, and who edits the body."""
    start = head.start
    follower: AnswerEditor | None
    if hasattr(editor, "edit_head"):
        replica = endpoint.replica if endpoint is not None else None
        account = grant.user_id if grant is not None else ""
        pin = Pin(account, replica.upstream, replica.url) if replica is not None else Pin(account, "", "")
        fields, follower = cast(HeadEditor, editor).edit_head(head.status, head.fields, pin)
        if fields is not head.fields:
            start = status_line(head.status) + join_fields(fields)
    else:
        follower = editor
    if follower is not None and (head.status != 200 or head.coding or not _is_edited(follower, head.kind)):
        follower = None
    return start, follower


def _is_edited(editor: AnswerEditor, kind: bytes) -> bool:
    if kind[:17] == b"text/event-stream":
        return True
    return kind[:16] == b"application/json" and getattr(editor, "edits_json", False)
