"""The list of models a caller may use, in the shape of OpenAI's or Anthropic's, with prices beside.

``prices`` is ours: dollars as text, by the names the configuration has for them. Clients ignore what they do not know.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from gpuproxy.plugin import Call, GatewayError, ModelOffer

_EPOCH = "1970-01-01T00:00:00Z"  # both shapes want a time of creation, which nobody here knows


def asks_for_models(call: Call) -> bool:
    """Tell whether the call asks for the list."""
    return call.path.partition(b"?")[0].rstrip(b"/") == b"/v1/models"


def listing(call: Call, offers: Sequence[ModelOffer]) -> bytes:
    """Return the list; Anthropic's clients name themselves by a header."""
    if call.method not in (b"GET", b"HEAD"):
        raise GatewayError("METHOD_NOT_ALLOWED", "/v1/models takes GET")
    is_anthropic = call.header(b"anthropic-version") is not None
    return msgspec.json.encode(_anthropic(offers) if is_anthropic else _openai(offers))


def _openai(offers: Sequence[ModelOffer]) -> dict[str, Any]:
    return {"object": "list", "data": [_model(offer) for offer in offers]}


def _model(offer: ModelOffer) -> dict[str, Any]:
    fields = {"id": offer.id, "object": "model", "created": 0, "owned_by": "gpuproxy"}
    return fields | ({"prices": offer.prices} if offer.prices else {})


def _anthropic(offers: Sequence[ModelOffer]) -> dict[str, Any]:
    data = [
        {"type": "model", "id": offer.id, "display_name": offer.id, "created_at": _EPOCH}
        | ({"prices": offer.prices} if offer.prices else {})
        for offer in offers
    ]
    ends = {"first_id": offers[0].id, "last_id": offers[-1].id} if offers else {"first_id": None, "last_id": None}
    return {"data": data, "has_more": False, **ends}
