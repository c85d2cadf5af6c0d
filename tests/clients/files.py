"""An upstream for plain HTTP: large bodies both ways, held-back answers, WebSocket, a mirror of requests."""

import asyncio
import hashlib
import json
import random

from aiohttp import HttpVersion11, WSMsgType, web

PIECE_BYTES = 65_536


def some_bytes(size: int) -> bytes:
    """Return `size` bytes that do not repeat and are always the same."""
    return random.Random(size).randbytes(size)


class FileServer:
    """The application; `gate` holds back the second half of ``/gated``."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.app = web.Application(client_max_size=1 << 30)
        self.app.add_routes(
            [
                web.get("/bytes/{size}", self.bytes),
                web.route("*", "/digest", self.digest),
                web.get("/gated", self.gated),
                web.get("/silent", self.silent),
                web.get("/ws", self.websocket),
                web.get("/status/{status}", self.status),
                web.post("/endpoint", self.endpoint),
                web.route("*", "/{path:.*}", self.mirror),
            ]
        )

    async def bytes(self, request: web.Request) -> web.StreamResponse:
        """Answer with as many bytes as the path says, chunked if the query asks for it."""
        content = some_bytes(int(request.match_info["size"]))
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        if "chunked" in request.query and request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(content)
        await response.prepare(request)
        if request.method != "HEAD":
            for start in range(0, len(content), PIECE_BYTES):
                await response.write(content[start : start + PIECE_BYTES])
        return response

    async def digest(self, request: web.Request) -> web.Response:
        """Tell what was uploaded."""
        digest, size = hashlib.sha256(), 0
        async for piece in request.content.iter_any():
            digest.update(piece)
            size += len(piece)
        return web.json_response({"sha256": digest.hexdigest(), "size": size, "headers": _headers(request)})

    async def gated(self, request: web.Request) -> web.StreamResponse:
        """Send a line, and another when the gate opens."""
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        await response.write(b"first\n")
        await self.gate.wait()
        await response.write(b"second\n")
        return response

    async def silent(self, request: web.Request) -> web.Response:
        """Say nothing until the gate opens."""
        await self.gate.wait()
        return web.Response(text="at last")

    async def websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Send every message back; say goodbye with the code 4001 when told to."""
        socket = web.WebSocketResponse(protocols=("echo",))
        await socket.prepare(request)
        async for message in socket:
            if message.data == "goodbye":
                await socket.close(code=4001, message=b"as you wish")
            elif message.type is WSMsgType.BINARY:
                await socket.send_bytes(message.data)
            else:
                await socket.send_str(message.data)
        return socket

    async def status(self, request: web.Request) -> web.Response:
        """Answer with the status the path says."""
        status = int(request.match_info["status"])
        if status in (204, 304):
            return web.Response(status=status)
        return web.Response(status=status, text=f"status {status}", headers={"Location": "/elsewhere"})

    async def endpoint(self, request: web.Request) -> web.Response:
        """Send back the JSON and how it was labelled."""
        body = json.loads(await request.read())
        return web.json_response({"received": body, "content_type": request.headers.get("Content-Type")})

    async def mirror(self, request: web.Request) -> web.Response:
        """Tell what the request looked like."""
        body = await request.text()
        seen = {
            "method": request.method,
            "path": request.raw_path,
            "headers": _headers(request),
            "body": body,
        }
        return web.json_response(seen)


def _headers(request: web.Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}
