"""``Idempotency-Key`` on a route: the effect happens once, and a repetition gets the same answer.

The answer is kept sealed, since it may hold a secret that is shown once and stored nowhere else.
"""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from uuid import uuid4

import msgspec
from aiohttp import web
from msgspec import Struct
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.idempotency import Claim, Reply, abandon, begin, claim_of, finish
from gpuproxy.control.parts import CALLER, KEYRING, STORE
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError

HEADER = "Idempotency-Key"
Work = Callable[[AsyncConnection], Awaitable[Struct]]
Calls = Callable[[str], Awaitable[Struct]]

_encode = msgspec.json.Encoder(order="deterministic").encode


async def once(request: web.Request, content: Struct | None, status: int, work: Work) -> web.Response:
    """Do `work` in a writing transaction and answer what it returns; with the header, once for all repetitions.

    `content` is what the call asks for: a repetition that asks for something else is refused.
    """
    store, key = request.app[STORE], request.headers.get(HEADER)
    if key is None:
        async with store.writing() as connection:
            return success(await work(connection), status)
    claim = _claim(request, key, content)
    if (reply := await begin(store, claim)) is not None:
        return _replayed(request, claim, reply)
    try:
        async with store.writing() as connection:
            response = success(await work(connection), status)
            sealed = request.app[KEYRING].seal(bytes(response.body), _context(claim))  # type: ignore[arg-type]
            await finish(connection, claim, Reply(status, sealed))
    except BaseException:
        await abandon(store, claim)
        raise
    return response


async def once_calling(request: web.Request, content: Struct | None, status: int, calls: Calls) -> web.Response:
    """Do what calls another service, so no transaction may be open: as `once`, but ended by its own last write.

    `calls` gets an id which is the same for all repetitions, to name by it what it makes here and there; for if this
    process dies before the answer is stored, a repetition does it all again.
    """
    store, key = request.app[STORE], request.headers.get(HEADER)
    if key is None:
        return success(await calls(uuid4().hex), status)
    claim = _claim(request, key, content)
    if (reply := await begin(store, claim)) is not None:
        return _replayed(request, claim, reply)
    try:
        response = success(await calls(sha256(_context(claim)).hexdigest()[:32]), status)
        sealed = request.app[KEYRING].seal(bytes(response.body), _context(claim))  # type: ignore[arg-type]
        async with store.writing() as connection:
            await finish(connection, claim, Reply(status, sealed))
    except BaseException:
        await abandon(store, claim)
        raise
    return response


def _claim(request: web.Request, key: str, content: Struct | None) -> Claim:
    """Return the claim; another credential of the same user is another request, for it may have fewer rights."""
    caller = request[CALLER]
    asked = _encode([caller.key_id, content])
    return claim_of(caller.user_id, f"{request.method} {request.path}", key, asked)


def _replayed(request: web.Request, claim: Claim, reply: Reply) -> web.Response:
    body = request.app[KEYRING].unseal(reply.body, _context(claim))
    if body is None:
        message = "this call was made before, but its answer can be read no more: the gateway's secret has changed"
        raise GatewayError("CONFLICT", message)
    headers = {"Idempotent-Replayed": "true"}
    return web.Response(body=body, status=reply.status, headers=headers, content_type="application/json")


def _context(claim: Claim) -> bytes:
    return "\n".join((claim.user_id, claim.route, claim.key)).encode()
