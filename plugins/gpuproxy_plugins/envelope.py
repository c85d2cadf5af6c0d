"""What the protocols share when they complete an envelope call: "complete, never override"."""

from gpuproxy.plugin import Call, HeaderList

_JSON_OPENERS = (b"{", b"[")


def looks_like_json(body: bytes | None) -> bool:
    """Tell whether the body is a JSON object or list, by its first byte."""
    return body is not None and body.lstrip()[:1] in _JSON_OPENERS


def content_type_if_absent(call: Call) -> HeaderList:
    """Return Content-Type: application/json for a JSON body whose caller named no type."""
    if looks_like_json(call.body) and call.header(b"content-type") is None:
        return [(b"Content-Type", b"application/json")]
    return []
