"""What an exchange asks about a call before it goes: whether its body is needed whole, which tools it may use, and what
it may cost.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from gpuproxy.errors import GatewayError
from gpuproxy.plugin import Call, HeaderList, Intent, ProtocolHandler, ToolReader
from gpuproxy.pricing import Price
from gpuproxy.proxy.heads import RequestHead
from gpuproxy.proxy.offers import highest
from gpuproxy.proxy.prices import Prices
from gpuproxy.types import TOOL_CALL

if TYPE_CHECKING:
    from gpuproxy.proxy.destination import Destination
    from gpuproxy.proxy.worker import Plane


def needs_whole(handler: ProtocolHandler, head: RequestHead, path: bytes, prices: Prices) -> bool:
    """Tell whether the handler needs the whole body; asked once for each head that differs from the one before.

    While tools have prices no head is believed about the tool it names: the body says what will run.
    """
    if not handler.needs_body(head.method, path):
        return False
    spares_body: Callable[[HeaderList], bool] | None = getattr(handler, "spares_body", None)  # see BodySparer
    return spares_body is None or prices.has_tools or not spares_body(head.fields)


def bind_tools(
    call: Call,
    head: RequestHead,
    rules: tuple[str, ...],
    handler: ProtocolHandler,
    own_handler: ProtocolHandler,
    upstream: str,
) -> None:
    """Bind a call of a key that may use some tools only; `own_handler` is that of the upstream it goes to.

    Raises GatewayError FORBIDDEN for one that would reach tools in a way in which the gateway cannot see which.
    """
    if not getattr(own_handler, "binds_tools", False):
        return
    if handler is not own_handler or head.is_upgrade:
        message = f"this API key is bound to tools; call {upstream!r} as protocol {own_handler.name!r}, by HTTP"
        raise GatewayError("FORBIDDEN", message)
    call.tools, call.upstream = rules, upstream


def check_protocol(handler: ProtocolHandler, destination: "Destination", prices: Prices) -> None:
    """Refuse a call of an upstream in another protocol than its own while anything has a price: by which is not seen.

    Raises GatewayError BAD_REQUEST.
    """
    if handler is not destination.handler and prices.is_any:
        message = f"upstream {destination.upstream!r} is called as protocol {destination.handler.name!r}"
        raise GatewayError("BAD_REQUEST", message, param="protocol")


def price_of_call(
    plane: "Plane",
    destination: "Destination | None",
    intent: Intent,
    started_ns: int,
    handler: ProtocolHandler,
    body: bytes | None,
    may_use_one: bool,
) -> Price | None:
    """Return the most a call may be charged by, None if nothing. Raises GatewayError BAD_REQUEST.

    Where it goes is not known yet: it must be able to pay for any place.
    """
    prices, model = plane.prices, intent.model
    at_ns = plane.wall_offset_ns + started_ns
    if destination is None or len(destination.places) == 1:
        upstream = destination.upstream if destination is not None else ""
        if prices.has_tools and getattr(handler, "tools_in", None) is not None:
            return _price_of_tools(prices, intent, upstream, at_ns, cast(ToolReader, handler), body)
        price = prices.find(model, upstream, at_ns)
        if price is None and not model and destination is not None and may_use_one and not intent.is_upload:
            _refuse_nameless(prices, destination, at_ns)
        return price
    return highest([prices.find(name or model, upstream, at_ns) for name, upstream in destination.places])


def refuse_deferred(price: Price) -> None:
    """Refuse a call whose answer does not tell what it uses, where that costs. Raises GatewayError BAD_REQUEST."""
    if price.input_nanousd_per_million or price.cached_input_nanousd_per_million or price.output_nanousd_per_million:
        message = "tokens of this model have a price: let this call answer, not one in the background or a batch"
        raise GatewayError("BAD_REQUEST", message)


def _refuse_nameless(prices: Prices, destination: "Destination", at_ns: int) -> None:
    """Refuse a call from which its model cannot be told, where one has a price: it would be served for nothing."""
    if any(prices.find(model, destination.upstream, at_ns) for model in destination.served.models):
        message = f"models of upstream {destination.upstream!r} have prices; name `model` in a JSON body below /v1/"
        raise GatewayError("BAD_REQUEST", message, param="model")


def _price_of_tools(
    prices: Prices, intent: Intent, upstream: str, at_ns: int, reader: ToolReader, body: bytes | None
) -> Price | None:
    # One receipt has one price: that of the tool it names, which must be the one that runs.
    tools = reader.tools_in(body) if body else intent.tools
    found = [prices.find_tool(tool, upstream, at_ns) for tool in tools or ()]
    is_one = tools == intent.tools and len(tools) == 1 and intent.rpc_method == TOOL_CALL  # no batch, not even of one
    if tools is None or (not is_one and any(price and price.tool for price in found)):
        message = "tools that have prices are called one at a time, in a message that can be read in one way only"
        raise GatewayError("BAD_REQUEST", message)
    return found[0] if found else prices.find(intent.model, upstream, at_ns)
