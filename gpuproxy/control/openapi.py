"""``/openapi.json``: the whole API, made from the table of routes and the types that decode it (OpenAPI 3.1)."""

import re
from functools import cache
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from gpuproxy import __version__
from gpuproxy.control.once import HEADER
from gpuproxy.control.route import RULES, SCOPE_BY_RULE, Route
from gpuproxy.errors import CODES

JSON = "application/json"
PROXY = "/api/v1/gpu/proxy"
REF = "#/components/schemas/{name}"
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
ERROR = {"$ref": "#/components/responses/Error"}
# What is no text in a query, in whichever route.
QUERY_TYPES = {
    **dict.fromkeys(("limit", "tail", "gpu_count"), "integer"),
    **dict.fromkeys(("min_vram", "max_price", "min_reliability", "cuda"), "number"),
    **dict.fromkeys(("spot", "living", "all"), "boolean"),
}


class Envelope(Struct):
    """A call to be made: `body` goes as JSON, a string as text. `method` is POST with a body, else GET."""

    protocol: str
    target_url: str
    method: str | None = None
    headers: dict[str, str] | None = None
    body: Any = None
    timeout_s: float | None = None
    stream: bool = False


# What workers serve themselves. Bodies and answers are those of the protocol, and pass unchanged.
FORWARDED = {
    f"{PROXY}/v1/{{path}}": (
        "post",
        "OpenAI and Anthropic shapes, routed by the model in the body; /v1/… is short for it",
    ),
    f"{PROXY}/v2/{{path}}": ("post", "Open Inference (V2), routed by the model in the path"),
    f"{PROXY}/mcp/{{name}}": ("post", "MCP (Streamable HTTP) with the upstream of this name"),
    f"{PROXY}/upstreams/{{name}}/{{path}}": ("get", "Any path and method of an upstream"),
    f"{PROXY}/instances/{{contract_id}}/{{port}}/{{path}}": (
        "get",
        "Any path of a port of your own instance",
    ),
}


async def show(request: web.Request) -> web.Response:
    """Describe the API for programs."""
    return web.Response(body=_encoded(), content_type=JSON, headers={"Cache-Control": "no-cache"})


@cache
def _encoded() -> bytes:
    from gpuproxy.control.table import TABLE  # it names `show`, so it comes later

    return msgspec.json.encode(document(TABLE))


def document(table: tuple[Route, ...]) -> dict[str, Any]:
    """Return the description of `table`, and of what is forwarded."""
    kinds = list({kind: None for route in table for kind in (route.takes, route.gives) if kind} | {Envelope: None})
    found, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    schema_of = dict(zip(kinds, found, strict=True))
    paths: dict[str, dict[str, Any]] = {f"{PROXY}": {"post": _envelope(schema_of[Envelope])}}
    for path, (method, summary) in FORWARDED.items():
        paths[path] = {method: _forwarded(path, summary)}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpuproxy", "version": __version__, "description": "The gateway for GPU inference."},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _error_schema()},
            "responses": {"Error": {"description": _codes(), "content": _json({"$ref": REF.format(name="Error")})}},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "an access token or an API key"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _operation(route: Route, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.handler.__module__.rpartition('.')[2]}_{route.handler.__name__}",
        "summary": route.summary,
        "description": f"{RULES[route.rule]}.",
        "tags": [_tag(route.path)],
        "security": [] if route.rule == "anyone" else SECURITY,
        "parameters": _parameters(route),
        "responses": {str(route.status): _answer(route, schema_of.get(route.gives)), "default": ERROR},
    }
    if scope := SCOPE_BY_RULE.get(route.rule):
        operation["x-scope"] = scope
    if route.takes is not None:
        is_needed = any(field.required for field in msgspec.structs.fields(route.takes))
        operation["requestBody"] = {"required": is_needed, "content": _json(schema_of[route.takes])}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    queried = [
        {"name": name, "in": "query", "description": meaning, "schema": {"type": QUERY_TYPES.get(name, "string")}}
        for name, meaning in route.query.items()
    ]
    once = {
        "name": HEADER,
        "in": "header",
        "description": "a repetition with it is answered the same, and does nothing",
    }
    return _path_parameters(route.path) + queried + ([{**once, "schema": {"type": "string"}}] if route.is_once else [])


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _answer(route: Route, schema: Any) -> dict[str, Any]:
    if route.shape == "other" or schema is None:
        return {"description": route.summary}
    status = {"const": "success"}
    if route.shape == "list":
        fields = {"data": {"type": "array", "items": schema}, "count": {"type": "integer"}, "status": status}
        if route.query.get("cursor"):
            fields["next_cursor"] = {"type": "string", "description": "missing on the last page"}
        schema = {"type": "object", "properties": fields, "required": ["data", "count", "status"]}
    elif route.shape == "object":
        fields = {"data": schema, "status": status}
        schema = {"allOf": [schema, {"type": "object", "properties": fields, "required": ["data", "status"]}]}
    return {"description": route.summary, "content": _json(schema)}


def _envelope(schema: Any) -> dict[str, Any]:
    called = {
        "type": "object",
        "properties": {
            "data": {"description": "the upstream's JSON untouched, a string for text, else base64"},
            "encoding": {"const": "base64"},
            "status": {"const": "success"},
            "status_code": {"type": "integer", "description": "the upstream's"},
            "headers": {"type": "object", "additionalProperties": {"type": "string"}},
            "duration_ms": {"type": "number"},
            "request_id": {"type": "string"},
            "usage": {"type": "object"},
        },
        "required": ["data", "status", "status_code", "headers", "duration_ms", "request_id"],
    }
    answer = {"description": "the upstream's answer; a stream passes as it is", "content": _json(called)}
    operation = _forwarded(PROXY, "Call any target by any protocol, in one JSON form")
    return operation | {
        "requestBody": {"required": True, "content": _json(schema)},
        "responses": {"200": answer, "default": ERROR},
    }


def _forwarded(path: str, summary: str) -> dict[str, Any]:
    return {
        "operationId": "proxy" + re.sub(r"\W+", "_", path.removeprefix(PROXY)).rstrip("_"),
        "summary": summary,
        "tags": ["proxy"],
        "security": SECURITY,
        "x-scope": "inference",
        "parameters": _path_parameters(path),
        "responses": {
            "200": {"description": "the upstream's answer, unchanged"},
            "default": {
                "description": "the upstream's answer, or a refusal of the gateway in the protocol's own shape"
            },
        },
    }


def _error_schema() -> dict[str, Any]:
    fields = {"error": {"type": "string"}, "code": {"enum": list(CODES)}, "request_id": {"type": "string"}}
    return {"title": "Error", "type": "object", "properties": fields, "required": list(fields)}


def _codes() -> str:
    return "\n".join(f"- `{name}` ({code.status}): {code.meaning}" for name, code in CODES.items())


def _json(schema: Any) -> dict[str, Any]:
    return {JSON: {"schema": schema}}


def _tag(path: str) -> str:
    return path.removeprefix("/api/v1").split("/")[1] if path.startswith("/api/v1/") else "operations"
