"""How a request reaches a page: who is signed in, whether the form is one of ours, what becomes of a refusal."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import msgspec
from aiohttp import web
from msgspec import Struct
from multidict import MultiDict

from gpuproxy.control.cookie import caller_by_cookie, prolong_cookie
from gpuproxy.control.here import is_same_origin
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.parts import CALLER
from gpuproxy.control.rates import count_request
from gpuproxy.errors import GatewayError

PREFIX = "/dashboard"
SIGN_IN = f"{PREFIX}/sign-in"

Show = Callable[[Visit], Awaitable[web.StreamResponse]]


class Page(Struct, frozen=True):
    """One method on one path. A form that is refused leads `back` to a page, which says why."""

    method: str
    path: str
    show: Show
    back: Show | None = None
    is_open: bool = False  # to those who are not signed in


def add_pages(app: web.Application, table: tuple[Page, ...]) -> None:
    """Serve the pages of `table`; a GET also as HEAD."""
    for each in table:
        if each.method == "GET":
            app.router.add_get(each.path, _served(each))
        else:
            app.router.add_route(each.method, each.path, _served(each))


def see_other(path: str) -> web.Response:
    """Send the browser to another page of ours, by GET."""
    return web.Response(status=303, headers={"Location": path, "Cache-Control": "no-store"})


def _served(each: Page) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def serve(request: web.Request) -> web.StreamResponse:
        if "\0" in request.path or "\0" in request.query_string:
            raise GatewayError("BAD_REQUEST", "the path or query has a NUL character in it")
        if each.method == "POST" and not is_same_origin(request):
            raise GatewayError("FORBIDDEN", "this form was not sent by a page of the gateway; programs use the API")
        if not await _is_let_in(each, request):
            asked = request.path_qs if each.method == "GET" else ""
            return see_other(f"{SIGN_IN}?{urlencode({'next': asked})}" if asked not in ("", PREFIX) else SIGN_IN)
        visit = await _visit(request)
        try:
            response = await each.show(visit)
            if each.method == "GET" and not each.is_open:  # forms may have ended the session
                await prolong_cookie(request, response)
            return response
        except GatewayError as error:
            if each.back is None:
                raise
            visit.error = error
            return await each.back(visit)

    return serve


async def _is_let_in(each: Page, request: web.Request) -> bool:
    caller = await caller_by_cookie(request)
    if caller is not None:
        request[CALLER] = caller
        if not each.is_open:
            count_request(request, caller)
    return caller is not None or each.is_open


async def _visit(request: web.Request) -> Visit:
    """Return the visit. Its request is a copy whose body is not read, which can be copied again."""
    if request.method != "POST":
        return Visit(request)
    unread = request.clone()
    sent = await request.post()
    return Visit(unread, MultiDict((name, value) for name, value in sent.items() if isinstance(value, str)))


@web.middleware
async def refusals_as_pages(request: web.Request, handler: Any) -> web.StreamResponse:
    """Show what was refused below ``/dashboard`` as a page: the same words, for people."""
    response: web.StreamResponse = await handler(request)
    if not (request.path == PREFIX or request.path.startswith(f"{PREFIX}/")) or response.status < 400:
        return response
    if not isinstance(response, web.Response) or response.content_type != "application/json":
        return response
    assert isinstance(response.body, bytes)
    told = msgspec.json.decode(response.body)
    shown = page(Visit(request), "refused.html", response.status, told=told)
    kept = {name: response.headers[name] for name in ("Allow", "Retry-After") if name in response.headers}
    shown.headers.update(kept)
    return shown
