"""Calls that bring no credential, and refusals that a protocol adds to: the worker's side of `gpuproxy.plugin.visits`.

Nothing here is paid by calls that bring a key and are not refused.
"""

from typing import TYPE_CHECKING, cast

from gpuproxy.codec.base_url import base_url
from gpuproxy.errors import GatewayError
from gpuproxy.plugin import Receptionist, Visit
from gpuproxy.proxy import refusal
from gpuproxy.proxy.headers import Field, is_valid_host, join_fields
from gpuproxy.proxy.heads import status_line

if TYPE_CHECKING:
    from gpuproxy.proxy.exchange_state import ExchangeState


def greeting(exchange: "ExchangeState") -> bytes | None:
    """Return the answer to a call without a credential, if its protocol has one. Raises GatewayError."""
    receptionist = _receptionist(exchange)
    fields = None if receptionist is None else receptionist.greet(_visit(exchange))
    if fields is None:
        return None
    end = b"" if exchange.keeps_alive else b"Connection: close\r\n"
    fields = [*fields, (b"X-Request-Id", exchange.request_id.encode())]
    return b"%b%b%b\r\n" % (status_line(204), join_fields(fields), end)


def refusal_fields(exchange: "ExchangeState", error: GatewayError, attempts: int) -> bytes:
    """Return the header lines of a refusal."""
    lines = refusal.fields_of(error, attempts)
    receptionist = _receptionist(exchange)
    if receptionist is None:
        return lines
    fields = receptionist.refusal_fields(_visit(exchange), error)
    names = tuple(name.lower() + b":" for name, _ in fields)
    kept = [line for line in lines.splitlines(keepends=True) if not line.lower().startswith(names)]
    return b"".join(kept) + join_fields(fields)


def _receptionist(exchange: "ExchangeState") -> Receptionist | None:
    handler = exchange.route.handler
    return cast(Receptionist, handler) if hasattr(handler, "refusal_fields") else None  # isinstance costs 2 µs


def _visit(exchange: "ExchangeState") -> Visit:
    head = exchange.head
    proxied = head.proxied_fields or []
    host = _first(proxied, b"x-forwarded-host") or head.host
    host = host if is_valid_host(host) else head.host
    public_url = exchange.plane.config.server.public_url
    url = base_url(public_url, _first(proxied, b"x-forwarded-proto").decode("latin-1"), host.decode("latin-1"))
    return Visit(head.method, head.target, head.fields, url)


def _first(fields: list[Field], wanted: bytes) -> bytes:
    """Return what the proxy nearest to the client has said."""
    return next((value.partition(b",")[0].strip() for name, value in fields if name.lower() == wanted), b"")
