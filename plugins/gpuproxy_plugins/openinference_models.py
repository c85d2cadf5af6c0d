"""The models a caller may use, listed or one shown, in the shape of OpenAI's or Anthropic's, with prices beside.

``prices`` is ours: dollars as text, by the names the configuration has for them. Clients ignore what they do not know.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from gpuproxy.plugin import Call, GatewayError, ModelOffer
from gpuproxy_plugins.openinference_refusal import AnthropicError

_LIST = b"/v1/models"
_EPOCH = "1970-01-01T00:00:00Z"  # both shapes want a time of creation, which nobody here knows


def asks_for_models(call: Call) -> bool:
    """Tell whether the call asks for the list, or to be shown one of it."""
    route = call.path.partition(b"?")[0].rstrip(b"/")
    return route == _LIST or (call.method in (b"GET", b"HEAD") and route.startswith(_LIST + b"/"))


def listing(call: Call, offers: Sequence[ModelOffer]) -> bytes:
    """Return the list, or the one model asked for; Anthropic's clients name themselves by a header."""
    if call.method not in (b"GET", b"HEAD"):
        raise GatewayError("METHOD_NOT_ALLOWED", "/v1/models takes GET", allow="GET, HEAD")
    is_anthropic = call.header(b"anthropic-version") is not None
    name = unquote_to_bytes(call.path.partition(b"?")[0][len(_LIST) :].strip(b"/")).decode("utf-8", "replace")
    if name:
        offer = _found(name, offers, AnthropicError if is_anthropic else GatewayError)
        return msgspec.json.encode(_anthropic_model(offer) if is_anthropic else _openai_model(offer))
    return msgspec.json.encode(_anthropic(offers) if is_anthropic else _openai(offers))


def _found(name: str, offers: Sequence[ModelOffer], kind: type[GatewayError]) -> ModelOffer:
    """Return the model of that name or alias. Raises UNKNOWN_MODEL: what may not be used is not there either."""
    for offer in offers:
        if name == offer.id or name in offer.aliases:
            return offer
    known = ", ".join(offer.id for offer in offers[:20]) or "none"
    raise kind("UNKNOWN_MODEL", f"no model {name[:100]!r}; known: {known}", param="model")


def _openai(offers: Sequence[ModelOffer]) -> dict[str, Any]:
    return {"object": "list", "data": [_openai_model(offer) for offer in offers]}


def _openai_model(offer: ModelOffer) -> dict[str, Any]:
    return {"id": offer.id, "object": "model", "created": 0, "owned_by": "gpuproxy"} | _prices(offer)


def _anthropic_model(offer: ModelOffer) -> dict[str, Any]:
    fields = {"type": "model", "id": offer.id, "display_name": offer.id, "created_at": _EPOCH}
    return fields | _prices(offer)


def _prices(offer: ModelOffer) -> dict[str, Any]:
    return {"prices": offer.prices} if offer.prices else {}


def _anthropic(offers: Sequence[ModelOffer]) -> dict[str, Any]:
    data = [_anthropic_model(offer) for offer in offers]
    ends = {"first_id": offers[0].id, "last_id": offers[-1].id} if offers else {"first_id": None, "last_id": None}
    return {"data": data, "has_more": False, **ends}
