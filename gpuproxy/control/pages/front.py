"""``/`` for browsers: what this is, and where to go."""

from aiohttp import web

from gpuproxy.control.cookie import caller_by_cookie
from gpuproxy.control.here import base_url
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.parts import CALLER, CONFIG


def is_for_people(request: web.Request) -> bool:
    """Tell whether a browser asks: one that names HTML, and no JSON before it."""
    accepted = request.headers.get("Accept", "").lower()
    html, json = accepted.find("text/html"), accepted.find("application/json")
    return html >= 0 and not 0 <= json < html


async def show(request: web.Request) -> web.Response:
    """Show the front page."""
    if (caller := await caller_by_cookie(request)) is not None:
        request[CALLER] = caller
    may_register = request.app[CONFIG].auth.allow_registration
    return page(Visit(request), "front.html", base_url=base_url(request), may_register=may_register)
