"""Answers of any size in little memory: pieces are fetched as the client takes them.

A failure before the first piece is an error like any other. After it the connection is cut, so that the client sees a
body without its end; a JSON document besides lacks its last brace.
"""

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from gpuproxy.control.respond import request_id_of
from gpuproxy.observe.logs import get_logger

PIECE_BYTES = 65_536
WRITE_S = 60.0  # a client that takes no piece for so long is cut off
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run such a cell

Pieces = AsyncGenerator[bytes, None]
Pages = AsyncIterator[Sequence[Any]]

_encode = msgspec.json.Encoder().encode
logger = get_logger(__name__)


async def stream(request: web.Request, pieces: Pieces, content_type: str, filename: str) -> web.StreamResponse:
    """Answer with the pieces, a few at a time."""
    async with aclosing(_gathered(pieces)) as gathered:
        first = await anext(gathered)
        headers = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{filename}"'}
        response = web.StreamResponse(headers={**headers, "Content-Type": content_type})
        await response.prepare(request)
        try:
            await _send(response, first)
            async for piece in gathered:
                await _send(response, piece)
            await response.write_eof()
        except Exception as error:
            logger.error("an export broke off", request_id=request_id_of(request), error=f"{type(error).__name__}")
            break_off(request)
    return response


def break_off(request: web.Request) -> None:
    """End the client's connection so that it sees the answer is not whole."""
    if request.transport is not None:
        request.transport.abort()


async def _send(response: web.StreamResponse, piece: bytes) -> None:
    async with asyncio.timeout(WRITE_S):
        await response.write(piece)


async def _gathered(pieces: Pieces) -> Pieces:
    """Join small pieces to some of PIECE_BYTES or a little more."""
    held = bytearray()
    async with aclosing(pieces):
        async for piece in pieces:
            held += piece
            if len(held) >= PIECE_BYTES:
                yield bytes(held)
                held.clear()
    yield bytes(held)


async def json_success(data: Pieces) -> Pieces:
    """Yield the shape of success around JSON that comes in pieces."""
    yield b'{"data":'
    async for piece in data:
        yield piece
    yield b',"status":"success"}'


async def json_object(fields: Iterable[tuple[str, Any]]) -> Pieces:
    """Yield a JSON object; a field that is pages becomes an array of all their rows."""
    yield b"{"
    for index, (name, value) in enumerate(fields):
        yield (b"," if index else b"") + _encode(name) + b":"
        if isinstance(value, AsyncIterator):
            async for piece in json_array(value):
                yield piece
        else:
            yield _encode(value)
    yield b"}"


async def json_array(pages: Pages) -> Pieces:
    """Yield the rows of all pages as one JSON array."""
    mark = b"["
    async for page in pages:
        for row in page:
            yield mark + _encode(row)
            mark = b","
    yield b"[]" if mark == b"[" else b"]"


async def json_lines(pages: Pages) -> Pieces:
    """Yield each row as JSON in a line of its own."""
    async for page in pages:
        for row in page:
            yield _encode(row) + b"\n"


async def csv_lines(names: Sequence[str], pages: Pages, cells: Callable[[Any], Iterable[Any]]) -> Pieces:
    """Yield a table as RFC 4180 has it, the names first. A cell that a spreadsheet would run is made text."""
    yield _csv_line(names)
    async for page in pages:
        for row in page:
            yield _csv_line(_harmless(cell) for cell in cells(row))


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell


def _csv_line(cells: Iterable[Any]) -> bytes:
    written = io.StringIO()
    csv.writer(written).writerow(cells)
    return written.getvalue().encode()
