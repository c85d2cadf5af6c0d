"""The stylesheet, the script and the icon of the pages, from memory; asked for by their hash, so browsers keep them."""

from hashlib import sha256
from importlib.resources import files

from aiohttp import web

from gpuproxy.control.pages.visit import Visit
from gpuproxy.errors import GatewayError

TYPES = {"pages.css": "text/css", "pages.js": "text/javascript", "icon.svg": "image/svg+xml"}
FILES = {name: files(__package__).joinpath("static", name).read_bytes() for name in TYPES}
VERSION = sha256(b"".join(FILES.values())).hexdigest()[:12]
FOR_EVER = "public, max-age=31536000, immutable"


async def show(visit: Visit) -> web.Response:
    """Serve a file; one that is asked for by its version is kept for ever."""
    request, name = visit.request, visit.request.match_info["name"]
    if name not in FILES:
        raise GatewayError("NOT_FOUND", f"no file {name[:100]!r}")
    is_current = request.query.get("v") == VERSION
    headers = {
        "Cache-Control": FOR_EVER if is_current else "no-cache",
        "ETag": f'"{VERSION}"',
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return web.Response(status=304, headers=headers)
    return web.Response(body=FILES[name], content_type=TYPES[name], charset="utf-8", headers=headers)
