"""What the demo's OpenAI and Open Inference sides share: decoding, faults, paced event streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import msgspec
import orjson
from aiohttp import web
from msgspec import Struct

Item = TypeVar("Item")
AnyRequest = TypeVar("AnyRequest", bound=Struct)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RefusedError(Exception):
    """A request the server refuses; each dialect words it in its own way."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


@web.middleware
async def tell_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Word a refusal as the protocol of the path does."""
    try:
        return await handler(request)
    except RefusedError as error:
        if request.path.startswith("/v2"):
            return json_answer({"error": error.message}, error.status)
        kind = "invalid_request_error"
        told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
        return json_answer({"error": told}, error.status)


async def decode(request: web.Request, kind: type[AnyRequest]) -> AnyRequest:
    """Read the body as `kind`. Raises RefusedError naming the field."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        raise RefusedError(400, message, place.rstrip("`").removeprefix(".") or None) from error
    except msgspec.DecodeError as error:
        raise RefusedError(400, f"the body is not valid JSON: {error}") from error


def check_model(name: str, *known: str) -> None:
    """Raise RefusedError unless the model is one of the known ones."""
    if name not in known:
        message = f"The model `{name}` does not exist here; known: {', '.join(known)}"
        raise RefusedError(404, message, "model", "model_not_found")


def json_answer(data: dict[str, Any], status: int = 200) -> web.Response:
    """Return an answer with a JSON body."""
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")


def event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def paced(items: Iterable[Item], delay_s: float) -> AsyncIterator[Item]:
    """Yield each item after a pause of about `delay_s`, ±30 % as a busy GPU would; 0 for none."""
    for index, item in enumerate(items):
        if delay_s:
            await asyncio.sleep(delay_s * (0.7 + 0.1 * (index * 5 % 7)))
        yield item


async def send_events(request: web.Request, events: AsyncIterator[bytes]) -> web.StreamResponse:
    """Send each event as it comes, until the client leaves."""
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    try:
        async for one in events:
            await response.write(one)
        await response.write_eof()
    except ConnectionResetError:
        pass  # nobody listens any more; an engine stops here
    return response
