"""The gateway's errors in the dialect of the path, so that official SDKs raise the exceptions they promise.

``…/v1/messages`` speaks Anthropic, ``…/v2…`` Open Inference, all else OpenAI, but for the own routes of Ollama and of
Text Generation Inference, whose errors are a text as those of V2 are. ``code`` is the gateway's own
where the dialect has no word for it.
"""

import msgspec

from gpuproxy.plugin import GatewayError

_encode = msgspec.json.Encoder().encode

# Type and code as api.openai.com sends them; everything else is an invalid request or a server error.
_OPENAI = {
    "UNAUTHORIZED": ("invalid_request_error", "invalid_api_key"),
    "UNKNOWN_MODEL": ("invalid_request_error", "model_not_found"),
    "INSUFFICIENT_CREDITS": ("insufficient_quota", "insufficient_quota"),
    "BUDGET_EXCEEDED": ("insufficient_quota", "insufficient_quota"),
    "RATE_LIMITED": ("rate_limit_error", "rate_limit_exceeded"),
}

_ANTHROPIC = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicError(GatewayError):
    """An error told in Anthropic's shape whatever the path is: the caller has named itself by a header."""


def refusal(path: bytes, error: GatewayError, request_id: str) -> bytes:
    """Return the JSON body that tells about `error` in the dialect of `path`."""
    route = path.partition(b"?")[0] + b"/"
    if b"/v1/messages/" in route or isinstance(error, AnthropicError):
        return anthropic_error(error, request_id)
    if b"/v2/" in route or _is_native(route):
        return _encode({"error": error.message, "code": error.code, "request_id": request_id})
    return openai_error(error)


def _is_native(route: bytes) -> bool:
    """Tell whether a route, with a slash at its end, is one of Ollama's or TGI's own."""
    return b"/v1/" not in route and (b"/api/" in route or route.endswith((b"/generate/", b"/generate_stream/")))


def openai_error(error: GatewayError) -> bytes:
    """Return OpenAI's error object."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    kind, code = _OPENAI.get(error.code, (default, error.code))
    param = error.param or ("model" if error.code == "UNKNOWN_MODEL" else None)
    return _encode({"error": {"message": error.message, "type": kind, "param": param, "code": code}})


def anthropic_error(error: GatewayError, request_id: str) -> bytes:
    """Return Anthropic's error object."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC.get(error.status, default)
    detail = {"type": kind, "message": error.message, "code": error.code}
    return _encode({"type": "error", "error": detail, "request_id": request_id})
