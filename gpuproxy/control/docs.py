"""``/docs``: the API for people, one plain page without script, from the same table."""

import base64
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from html import escape

import msgspec
from aiohttp import web
from msgspec import NODEFAULT, UNSET, Struct

from gpuproxy import __version__
from gpuproxy.control.openapi import FORWARDED, PROXY
from gpuproxy.control.route import RULES, Route
from gpuproxy.errors import CODES

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font:14px ui-monospace,monospace}table{border-collapse:collapse}"
    "td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}h2{margin-top:2rem}"
)
STYLE_HASH = base64.b64encode(sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


async def show(request: web.Request) -> web.Response:
    """Describe the API for people."""
    return web.Response(text=_page(), content_type="text/html", headers=HEADERS)


@cache
def _page() -> str:
    from gpuproxy.control.table import TABLE  # it names `show`, so it comes later

    return "\n".join(_lines(TABLE))


def _lines(table: tuple[Route, ...]) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>gpuproxy API</title><style>{STYLE}</style>'
    yield f"<h1>gpuproxy {escape(__version__)}</h1>"
    yield "<p>A credential goes into <code>X-API-Key</code> or <code>Authorization: Bearer</code>."
    yield 'For programs: <a href="/openapi.json">openapi.json</a>.</p>'
    yield "<h2>Forwarded</h2><table>"
    yield _row(f"POST {PROXY}", "any target by any protocol, in one JSON form")
    yield from (_row(f"{method.upper()} {path}", summary) for path, (method, summary) in FORWARDED.items())
    yield "</table>"
    for route in table:
        yield from _section(route)
    yield "<h2>Errors</h2><table>"
    yield from (_row(f"{name} {code.status}", code.meaning) for name, code in CODES.items())
    yield "</table></html>"


def _section(route: Route) -> Iterator[str]:
    yield f"<h2><code>{route.method} {escape(route.path)}</code></h2>"
    yield f"<p>{escape(route.summary)}<br>Who: {escape(RULES[route.rule])}.</p>"
    yield "<table>"
    yield from (_row(f"?{name}", meaning) for name, meaning in route.query.items())
    if route.takes is not None:
        yield from (_row(name, meaning) for name, meaning in _fields(route.takes))
    yield "</table>"


def _fields(kind: type[Struct]) -> Iterator[tuple[str, str]]:
    for field in msgspec.structs.fields(kind):
        is_left_out = field.default in (NODEFAULT, UNSET, None)
        default = "" if is_left_out else f", {msgspec.json.encode(field.default).decode()} if left out"
        yield field.encode_name, ("needed" if field.required else "may be left out") + default


def _row(name: str, meaning: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(meaning)}</td></tr>"
