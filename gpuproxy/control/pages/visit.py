"""One request for a page: who came, what the form says, and how the page asks the management API.

Asking goes to the handler of a route as a request over the wire would, behind the same checks, with no connection
between: scope, body by its type, query, Idempotency-Key.
"""

from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict, MultiDict, MultiDictProxy
from yarl import URL

from gpuproxy.access.callers import Caller
from gpuproxy.control.body import decode
from gpuproxy.control.once import HEADER
from gpuproxy.control.parts import CALLER
from gpuproxy.control.route import Handler, Route, check_scope
from gpuproxy.errors import GatewayError

ONCE = "once"  # the field that makes a form's effect happen once, however often it is sent

_encode = msgspec.json.Encoder().encode
_read = msgspec.json.Decoder(float_hook=Decimal).decode


class Visit:
    """A request for a page. `error` is why the form that was sent did nothing."""

    def __init__(self, request: web.Request, form: Mapping[str, Any] | None = None) -> None:
        self.request = request
        self.form: MultiDictProxy[str] = MultiDictProxy(MultiDict(form or {}))
        self.error: GatewayError | None = None

    @property
    def caller(self) -> Caller | None:
        """Return who is signed in."""
        return self.request.get(CALLER)

    @property
    def id(self) -> str:
        """Return the id in the path."""
        return self.request.match_info["id"]

    def query(self, *names: str) -> dict[str, str]:
        """Return those parameters that are not empty: a form sends all its fields."""
        return {name: self.request.query[name] for name in names if self.request.query.get(name)}

    def text(self, name: str) -> str:
        """Return what was written into a field, without the spaces around it."""
        return self.form.get(name, "").strip()

    def whole(self, name: str) -> int | None:
        """Return the number in a field, None if it is empty. Raises GatewayError."""
        text = self.text(name)
        if text and not (text.isascii() and text.isdigit() and len(text) <= 9):
            raise GatewayError("UNPROCESSABLE", f"{name}: {text[:40]!r} is no whole number", param=name)
        return int(text) if text else None

    def words(self, name: str) -> list[str]:
        """Return what is in a field, parted by commas or spaces."""
        return self.text(name).replace(",", " ").split()

    def filled(self, *names: str) -> dict[str, str]:
        """Return the fields that are not empty."""
        return {name: self.text(name) for name in names if self.text(name)}

    async def ask(
        self,
        handler: Handler,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        **path: str,
    ) -> Any:
        """Return what the API's route answers: JSON, its numbers with a point as Decimal. Raises as the route does."""
        route = _routes()[handler]
        if route.rule != "anyone":
            check_scope(route, self.request)
        arguments = [decode(route.takes, _encode(body or {}))] if route.takes else []
        response = await handler(self._asked(route, query or {}, path), *arguments)
        assert isinstance(response, web.Response)
        assert isinstance(response.body, bytes)
        return _read(response.body)

    def _asked(self, route: Route, query: Mapping[str, str], path: Mapping[str, str]) -> web.Request:
        headers = CIMultiDict(self.request.headers)
        headers.popall(HEADER, None)
        if self.text(ONCE):
            headers[HEADER] = self.text(ONCE)
        url = URL.build(path=route.path.format_map(path), query=query)
        asked = self.request.clone(method=route.method, rel_url=url, headers=headers)
        place = web.UrlMappingMatchInfo(dict(path), self.request.match_info.route)
        place.add_app(self.request.app)
        asked._match_info = place  # as aiohttp's own middlewares do; there is no public way
        return asked


@cache
def _routes() -> dict[Handler, Route]:
    from gpuproxy.control.table import TABLE  # it names handlers that show pages

    return {route.handler: route for route in TABLE}
