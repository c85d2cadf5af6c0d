"""What a route of the management API declares, and how a request reaches its handler.

Credential before body, so that who may not call learns nothing about what the call takes. Handlers find the caller in
``request[CALLER]``; those that take a body get it decoded, as their second argument.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from aiohttp import web
from msgspec import Struct

from gpuproxy.access.accounts import ADMIN_SCOPE
from gpuproxy.control.body import decode
from gpuproxy.control.identify import identify
from gpuproxy.control.parts import CALLER
from gpuproxy.control.rates import count_request
from gpuproxy.errors import GatewayError

Rule = Literal["anyone", "key", "read", "account", "admin"]
RULES: dict[Rule, str] = {
    "anyone": "needs no credential",
    "key": "any valid API key or access token; shows the caller's own account",
    "read": "an access token, or a key with the scope read or account; shows the caller's own account",
    "account": "an access token, or a key with the scope account; concerns the caller's own account",
    "admin": "an admin's access token, or an admin's key with the scope admin",
}
SCOPE_BY_RULE: dict[Rule, str] = {"read": "read", "account": "account", "admin": ADMIN_SCOPE}
Shape = Literal["object", "list", "plain", "other"]

Handler = Callable[..., Awaitable[web.StreamResponse]]


class Route(Struct, frozen=True):
    """One method on one path.

    The answer is a `gives`: in the shape of success, as a list of them, plain, or something of its own. `query` names
    the parameters and says what they are. `is_once` tells that Idempotency-Key is heeded.
    """

    method: str
    path: str
    handler: Handler
    rule: Rule
    takes: type[Struct] | None = None
    gives: type[Struct] | None = None
    shape: Shape = "object"
    status: int = 200
    query: Mapping[str, str] = {}
    is_once: bool = False

    @property
    def summary(self) -> str:
        """Return what the route does: the first line of its handler's docstring."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0]


def add_routes(app: web.Application, table: tuple[Route, ...]) -> None:
    """Serve the routes of `table`; a GET also as HEAD."""
    for route in table:
        if route.method == "GET":
            app.router.add_get(route.path, _served(route))
        else:
            app.router.add_route(route.method, route.path, _served(route))


def _served(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def serve(request: web.Request) -> web.StreamResponse:
        if "\0" in request.path or "\0" in request.query_string:
            raise GatewayError("BAD_REQUEST", "the path or query has a NUL character in it")
        if route.rule != "anyone":
            request[CALLER] = await identify(request)
            count_request(request, request[CALLER])
            check_scope(route, request)
            check_query(route, request)
        arguments: list[Any] = [decode(route.takes, await request.read())] if route.takes else []
        response = await route.handler(request, *arguments)
        if not response.prepared and "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = "no-store"
        return response

    return serve


def check_query(route: Route, request: web.Request) -> None:
    """Raise GatewayError UNPROCESSABLE for a parameter `route` does not know: a misspelt filter filters nothing."""
    for name in request.query if route.query else ():
        if name not in route.query:
            message = f"no parameter {name[:40]!r}; known: {', '.join(route.query)}"
            raise GatewayError("UNPROCESSABLE", message, param=name[:40])


def check_scope(route: Route, request: web.Request) -> None:
    """Raise GatewayError FORBIDDEN if the caller may not call `route`."""
    scope = SCOPE_BY_RULE.get(route.rule)
    held = request[CALLER].scopes
    if scope is not None and scope not in held and not (scope == "read" and "account" in held):
        message = f"{route.method} {route.path} needs the scope {scope!r}"
        raise GatewayError("FORBIDDEN", message if scope != ADMIN_SCOPE else f"{message} of an admin")
