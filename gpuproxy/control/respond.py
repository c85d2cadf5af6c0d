"""Answers of the management API: the shapes of success and failure, and the middleware that holds them.

Only workers reach control's socket, so their X-Request-Id is trusted; every error and log line carries it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from aiohttp import web
from msgspec import Struct, structs

from gpuproxy.control.frames import WEBSOCKET_VERSION
from gpuproxy.errors import CODES, GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import fault_of, is_away

CODE_BY_STATUS = {400: "BAD_REQUEST", 404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED", 413: "BODY_TOO_LARGE"}
KEPT_HEADERS = ("Allow", "Retry-After", "WWW-Authenticate")
REQUEST_ID = web.RequestKey("request_id", str)

_encode = msgspec.json.Encoder().encode
logger = get_logger(__name__)


def answer(fields: Mapping[str, Any], status: int = 200) -> web.Response:
    """Return `fields` as a JSON object."""
    return web.Response(body=_encode(fields), status=status, content_type="application/json")


def success(data: Mapping[str, Any] | Struct, status: int = 200) -> web.Response:
    """Return one thing: under ``data``, and its fields at the top level too, where simple clients look."""
    return answer(success_fields(data), status)


def success_fields(data: Mapping[str, Any] | Struct) -> dict[str, Any]:
    """Return what `success` answers."""
    fields = structs.asdict(data) if isinstance(data, Struct) else data
    return {**fields, "data": data, "status": "success"}


def listing(data: Sequence[Any]) -> web.Response:
    """Return several things and their count."""
    return answer({"data": data, "count": len(data), "status": "success"})


def page_of(data: Sequence[Any], limit: int) -> web.Response:
    """Return a part of a long list; with ``next_cursor``, the id of its last row, if more may follow."""
    fields: dict[str, Any] = {"data": data, "count": len(data), "status": "success"}
    return answer(fields | ({"next_cursor": data[-1].id} if len(data) == limit else {}))


def failure(error: GatewayError, request_id: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return the error in its one shape."""
    fields = {"error": error.message, "code": error.code, "request_id": request_id}
    response = answer(fields, error.status)
    response.headers.update(headers or {})
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.code == "UPGRADE_REQUIRED":
        response.headers["Sec-WebSocket-Version"] = WEBSOCKET_VERSION  # RFC 6455 §4.2.2
    return response


def request_id_of(request: web.Request) -> str:
    """Return the id the worker gave this request."""
    if REQUEST_ID not in request:
        request[REQUEST_ID] = request.headers.get("X-Request-Id") or uuid4().hex
    return request[REQUEST_ID]


async def name_server(_request: web.Request, response: web.StreamResponse) -> None:
    """Keep the versions of Python and aiohttp to ourselves."""
    response.headers["Server"] = "gpuproxy"


@web.middleware
async def errors_in_one_shape(request: web.Request, handler: Any) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer; what nobody expected is logged once."""
    try:
        response: web.StreamResponse = await handler(request)
    except GatewayError as error:
        return failure(error, request_id_of(request))
    except web.HTTPException as error:
        return failure(_translated(request, error), request_id_of(request), _kept(error))
    except Exception as error:
        if is_away(error):
            logger.error("store is away", request_id=request_id_of(request), path=request.path, error=fault_of(error))
            return failure(GatewayError("UNAVAILABLE", "the store is away", retry_after_s=2), request_id_of(request))
        logger.exception("request failed", request_id=request_id_of(request), path=request.path)
        message = "a fault of the gateway; the request id finds it in the log"
        return failure(GatewayError("INTERNAL", message), request_id_of(request))
    return response


def _translated(request: web.Request, error: web.HTTPException) -> GatewayError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return GatewayError("METHOD_NOT_ALLOWED", f"{request.path} serves {allowed}, not {error.method}")
    if error.status == 404:
        return GatewayError("NOT_FOUND", f"no path {request.path}")
    code = CODE_BY_STATUS.get(error.status, "BAD_REQUEST" if error.status < 500 else "INTERNAL")
    return GatewayError(code, error.text or CODES[code].meaning)


def _kept(error: web.HTTPException) -> dict[str, str]:
    return {name: error.headers[name] for name in KEPT_HEADERS if name in error.headers}
