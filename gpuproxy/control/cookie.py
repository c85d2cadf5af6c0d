"""The session cookie: a browser signs in once for the pages and for ``/ws``.

It carries a token of its own kind, as good as its session: logging out, a new password or a blocked user ends it. No
script can read it, and the API does not take it, so that another site can make a browser do nothing there. What takes
it and does something asks `is_same_origin` first, for SameSite=Lax knows sites and not origins (RFC 6265bis §5.6.7).
"""

import time

from aiohttp import web

from gpuproxy.access import tokens
from gpuproxy.access.callers import Caller, caller_by_token
from gpuproxy.access.sessions import prolong_session
from gpuproxy.control.here import is_https, is_same_origin
from gpuproxy.control.parts import CONFIG, KEYRING, STORE
from gpuproxy.errors import GatewayError

NAME = "gpuproxy"
SECURE_NAME = "__Host-gpuproxy"  # browsers take it over TLS only and from no neighbour in the domain


SIGNED_IN = web.RequestKey("signed_in", tokens.Claims)  # of the cookie that was good
RENEWALS = 30  # in the life of a cookie, of who visits every day


async def caller_by_cookie(request: web.Request) -> Caller | None:
    """Return who is signed in; None for no cookie, or one that is good no more."""
    cookie = request.cookies.get(_name(request))
    if not cookie:
        return None
    try:
        claims = tokens.read(request.app[KEYRING], cookie, tokens.COOKIE)
    except GatewayError:
        return None
    request[SIGNED_IN] = claims
    return await caller_by_token(request.app[STORE], claims)


async def prolong_cookie(request: web.Request, response: web.StreamResponse) -> None:
    """Let the session of who is signed in last from now on, if its cookie is a while old."""
    claims = request[SIGNED_IN]
    lifetime_s = request.app[CONFIG].auth.refresh_token_s
    if time.time() - claims.iat >= lifetime_s / RENEWALS:
        await prolong_session(request.app[STORE], claims.sid, lifetime_s)
        set_cookie(request, response, claims.sub, claims.sid)


def set_cookie(request: web.Request, response: web.StreamResponse, user_id: str, session_id: str) -> None:
    """Let the browser carry the session on, for as long as it lasts unused."""
    lifetime_s = request.app[CONFIG].auth.refresh_token_s
    claims = tokens.claims_for(user_id, session_id, lifetime_s, tokens.COOKIE)
    response.set_cookie(
        _name(request),
        tokens.sign(request.app[KEYRING], claims),
        max_age=int(lifetime_s),
        path="/",
        secure=is_https(request),
        httponly=True,
        samesite="Lax",
    )


def forget_cookie(request: web.Request, response: web.StreamResponse) -> None:
    """Take the cookie from the browser."""
    response.del_cookie(_name(request), path="/", secure=is_https(request), httponly=True, samesite="Lax")


def is_trusted_page(request: web.Request) -> bool:
    """Tell whether a page of ours sent this, or one of ``[auth] cookie_origins``."""
    return is_same_origin(request) or request.headers.get("Origin") in request.app[CONFIG].auth.cookie_origins


def _name(request: web.Request) -> str:
    return SECURE_NAME if is_https(request) else NAME
