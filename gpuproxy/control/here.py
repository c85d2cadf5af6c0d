"""Where the gateway is for who calls: its URL, whether it is reached by TLS, and whether a page is its own.

Workers write X-Forwarded-Proto and X-Forwarded-Host on every call: what a proxy in ``trusted_proxies`` said, else what
they saw themselves. Of several proxies the one nearest to the client stands first.
"""

from aiohttp import web

from gpuproxy.codec import base_url as urls
from gpuproxy.control.parts import CONFIG


def base_url(request: web.Request) -> str:
    """Return the gateway's URL as clients know it, without a slash at its end."""
    return urls.base_url(_public_url(request), _proto(request), _host(request))


def is_https(request: web.Request) -> bool:
    """Tell whether the browser came by TLS: a trusted proxy says so, or it came to a public_url that is https."""
    return _proto(request) == "https" or _public_origin(request) == f"https://{_host(request)}"


def is_same_origin(request: web.Request) -> bool:
    """Tell whether a page of ours sent this; browsers say so, and what says nothing is none of ours.

    Sec-Fetch-Site is sent over TLS and to the own machine; Origin with every POST and every WebSocket. The scheme of
    Origin is not compared: a proxy that is not in ``trusted_proxies`` may have come by another.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("Origin")
    if not origin:
        return False
    scheme, _, place = origin.partition("://")
    called = _host(request).removesuffix(":443" if scheme == "https" else ":80")
    return place == called or origin == _public_origin(request)


def _public_url(request: web.Request) -> str:
    return request.app[CONFIG].server.public_url


def _public_origin(request: web.Request) -> str:
    return urls.origin_of(_public_url(request))


def _proto(request: web.Request) -> str:
    return _first(request, "X-Forwarded-Proto")


def _host(request: web.Request) -> str:
    return _first(request, "X-Forwarded-Host") or request.host.lower()


def _first(request: web.Request, name: str) -> str:
    return request.headers.get(name, "").partition(",")[0].strip().lower()
