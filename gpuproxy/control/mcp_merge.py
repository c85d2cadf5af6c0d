"""Answers of several MCP servers made into one.

Lists are put together by the names clients see, all pages in one. A group promises what one of its servers does, but
for what it does not know: experiments, extensions, tasks.
"""

from collections.abc import Iterable, Sequence
from importlib.metadata import version as version_of
from typing import Any

import msgspec
from msgspec import Raw

from gpuproxy.codec.mcp import UNREADABLE, Fields, object_of, raw, text_of
from gpuproxy.control.mcp_inner import Told
from gpuproxy.control.mcp_names import decode_list, relabelled, texts_of

LISTS = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}
PROMISED = {  # and what of each
    "tools": ("listChanged",),
    "prompts": ("listChanged",),
    "resources": ("listChanged", "subscribe"),
    "completions": (),
    "logging": (),
}
TRUE = Raw(b"true")

_decode_int = msgspec.json.Decoder(int).decode


def merged_list(field: str, pages: Sequence[Told]) -> Fields:
    """Return one list of all that the servers listed."""
    items: list[Raw] = []
    merged: Fields = {}
    lifetimes: list[int] = []
    for told in pages:
        result = object_of(told.response, "result")
        items += [relabelled(item, told.server) for item in _items(result, field)]
        lifetimes += _number(result, "ttlMs")
        merged = merged or result
    merged = {name: value for name, value in merged.items() if name not in (field, "nextCursor")}
    if "cacheScope" in merged:
        merged |= {"cacheScope": Raw(b'"private"'), "ttlMs": raw(min(lifetimes, default=0))}
    return merged | {field: raw(items)}


def merged_session(group: str, told: Sequence[Told]) -> Fields:
    """Return the result of `initialize` for all who have agreed, in the oldest of their revisions."""
    results = {each.server: object_of(each.response, "result") for each in told}
    revision = min(text_of(result, "protocolVersion") for result in results.values())
    return _described(results) | {"protocolVersion": raw(revision), "serverInfo": raw(_info(group))}


def merged_discovery(group: str, told: Sequence[Told]) -> Fields:
    """Return the result of `server/discover`: the revisions that all of them speak."""
    results = {each.server: object_of(each.response, "result") for each in told}
    first = next(iter(results.values()))
    spoken = [texts_of(result, "supportedVersions") for result in results.values()]
    common = [revision for revision in spoken[0] if all(revision in others for others in spoken)]
    kept = {name: value for name, value in first.items() if name in ("resultType", "ttlMs", "cacheScope")}
    if "cacheScope" in kept:
        kept |= {"cacheScope": Raw(b'"private"'), "ttlMs": Raw(b"0")}
    meta = {"io.modelcontextprotocol/serverInfo": _info(group)}
    return kept | _described(results) | {"supportedVersions": raw(common), "_meta": raw(meta)}


def next_cursor(told: Told) -> str:
    """Return what continues a server's list, empty if it is whole."""
    return text_of(object_of(told.response, "result"), "nextCursor")


def is_unknown_method(told: Told) -> bool:
    """Tell whether a server does not have what it was asked for: prompts, or resources."""
    return _number(object_of(told.response, "error"), "code") == [-32601]


def _described(results: dict[str, Fields]) -> Fields:
    offered = [object_of(result, "capabilities") for result in results.values()]
    capabilities: dict[str, Any] = {}
    for name, parts in PROMISED.items():
        found = [object_of(each, name) for each in offered if name in each]
        if found:
            capabilities[name] = {part: True for part in parts if any(each.get(part) == TRUE for each in found)}
    hints = {server: text_of(result, "instructions") for server, result in results.items()}
    said = [f"{server}: {hint}" for server, hint in hints.items() if hint]
    described = {"capabilities": raw(capabilities)}
    return described | ({"instructions": raw("\n\n".join(said))} if said else {})


def _info(group: str) -> dict[str, str]:
    return {"name": f"gpuproxy/{group}", "version": version_of("gpuproxy")}


def _items(result: Fields, field: str) -> Iterable[Raw]:
    try:
        return decode_list(result[field]) if field in result else []
    except UNREADABLE:
        return []


def _number(fields: Fields, name: str) -> list[int]:
    try:
        return [_decode_int(fields[name])] if name in fields else []
    except UNREADABLE:
        return []
