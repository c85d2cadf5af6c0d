"""Whether the books add up: ``/api/v1/admin/ledger/verify``."""

import asyncio

from aiohttp import web
from msgspec import Struct

from gpuproxy.control.parts import STORE
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.verify import Fault
from gpuproxy.ledger.verify import verify as verify_books

_verifying = asyncio.Semaphore(1)  # it reads all transfers, in seconds if there are millions


class Verdict(Struct):
    """Everything that does not hold; nothing if the books are sound."""

    is_sound: bool
    faults: list[Fault]


async def verify(request: web.Request) -> web.Response:
    """Check that every transfer, balance and hold adds up."""
    if _verifying.locked():
        raise GatewayError("CONFLICT", "the books are being checked already; wait for that", retry_after_s=5)
    async with _verifying:
        faults = await verify_books(request.app[STORE])
    return success(Verdict(not faults, faults))
