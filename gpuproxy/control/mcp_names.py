"""Names of what several MCP servers offer behind one endpoint: ``server__tool``, ``server__prompt``, ``server+uri``.

Nothing else of a message is changed: numbers and the order of fields stay as the server or client wrote them.
"""

from collections.abc import Callable, Iterable

import msgspec
from msgspec import Raw

from gpuproxy.codec.mcp import UNREADABLE, Fields, decode_fields, encode, object_of, raw, text_of

MARK = "__"  # no server of a group has it in its name
URI_MARK = "+"  # a scheme may hold it (RFC 3986 §3.1), a server's name not

decode_list = msgspec.json.Decoder(list[Raw]).decode
_decode_texts = msgspec.json.Decoder(list[str]).decode


def texts_of(fields: Fields, name: str) -> list[str]:
    """Return a field that is a list of texts, empty if it is not."""
    try:
        return _decode_texts(fields[name]) if name in fields else []
    except UNREADABLE:
        return []


def shown_name(server: str, name: str) -> str:
    """Return the name of a server's tool or prompt as clients see it."""
    return f"{server}{MARK}{name}"


def shown_uri(server: str, uri: str) -> str:
    """Return the URI of a server's resource as clients see it."""
    return f"{server}{URI_MARK}{uri}"


def split(text: str, mark: str, servers: Iterable[str]) -> tuple[str, str]:
    """Return the server that a shown name or URI begins with, and what it is there; two empty texts for none."""
    server, found, name = text.partition(mark)
    return (server, name) if found and server in servers else ("", "")


def relabelled(item: Raw, server: str) -> Raw:
    """Return a listed tool, prompt, resource or template by the name clients see."""
    try:
        fields = decode_fields(item)
    except UNREADABLE:
        return item
    for field in ("uri", "uriTemplate"):
        if field in fields:
            fields[field] = raw(shown_uri(server, text_of(fields, field)))
            return raw(fields)
    if "name" in fields:
        fields["name"] = raw(shown_name(server, text_of(fields, "name")))
    return raw(fields)


def outward(payload: bytes, server: str) -> bytes:
    """Return a server's message as its client may see it.

    A request carries its server in its id, so that the answer finds its way back, and so does the word that it is
    cancelled; what names a resource leads here again.
    """
    try:
        message = decode_fields(payload)
        if "method" in message:
            return _asked(message, payload, server)
        if "result" not in message or b'"uri"' not in payload:
            return payload
        result = decode_fields(message["result"])
    except UNREADABLE:
        return payload
    for name, change in (("contents", _located), ("content", _linked), ("messages", _spoken)):
        if name in result:
            result[name] = _each(result[name], server, change)
    message["result"] = raw(result)
    return encode(message)


def _asked(message: Fields, payload: bytes, server: str) -> bytes:
    if "id" in message:
        message["id"] = _labelled(message["id"], server)
        return encode(message)
    method, params = text_of(message, "method"), object_of(message, "params")
    if method == "notifications/resources/updated":
        params = _located(params, server)
    elif method == "notifications/cancelled" and "requestId" in params:
        params["requestId"] = _labelled(params["requestId"], server)
    else:
        return payload
    message["params"] = raw(params)
    return encode(message)


def _labelled(rpc_id: Raw, server: str) -> Raw:
    return raw(f"{server}{MARK}{bytes(rpc_id).decode()}")


def inward(answer: Fields, servers: Iterable[str]) -> tuple[str, Fields]:
    """Return whose request a client's response answers, and the response with the id of that request."""
    server, rpc_id = split(text_of(answer, "id"), MARK, servers)
    return server, answer | {"id": Raw(rpc_id.encode())}


def _each(items: Raw, server: str, change: Callable[[Fields, str], Fields]) -> Raw:
    try:
        return raw([raw(change(decode_fields(item), server)) for item in decode_list(items)])
    except UNREADABLE:
        return items


def _located(fields: Fields, server: str) -> Fields:
    return fields | {"uri": raw(shown_uri(server, text_of(fields, "uri")))} if "uri" in fields else fields


def _linked(fields: Fields, server: str) -> Fields:
    if text_of(fields, "type") == "resource_link":
        return _located(fields, server)
    if "resource" in fields:
        return fields | {"resource": raw(_located(object_of(fields, "resource"), server))}
    return fields


def _spoken(fields: Fields, server: str) -> Fields:
    content = object_of(fields, "content")
    return fields | {"content": raw(_linked(content, server))} if content else fields
