"""What payment providers tell: ``/api/v1/billing/webhooks/{provider}``. The signature is the credential."""

from aiohttp import web
from msgspec import Struct

from gpuproxy.billing.settle import take
from gpuproxy.control.parts import STORE
from gpuproxy.control.paying import PAYMENTS
from gpuproxy.control.respond import answer
from gpuproxy.errors import GatewayError

BODY_BYTES_MAX = 262_144  # Stripe's largest events are a tenth of that


class Received(Struct):
    """How many events were new and did something."""

    status: str
    count: int


async def receive(request: web.Request) -> web.Response:
    """Take what a payment provider tells; each event counts once."""
    name = request.match_info["provider"]
    provider = request.app[PAYMENTS].get(name)
    if provider is None:
        raise GatewayError("NOT_FOUND", f"no payment provider {name[:64]!r} is configured")
    headers = {field.lower(): value for field, value in request.headers.items()}
    count = 0
    for event in provider.parse_webhook(headers, await _body(request)):
        async with request.app[STORE].writing() as connection:  # each its own: it locks the account of its customer
            count += await connection.run_sync(take, name, event)
    return answer({"status": "success", "count": count})


async def _body(request: web.Request) -> bytes:
    """Return the body as it was signed, byte for byte."""
    if (request.content_length or 0) > BODY_BYTES_MAX:
        raise GatewayError("BODY_TOO_LARGE", f"the body is over {BODY_BYTES_MAX} bytes")
    body = await request.read()
    if len(body) > BODY_BYTES_MAX:
        raise GatewayError("BODY_TOO_LARGE", f"the body is over {BODY_BYTES_MAX} bytes")
    return body
