"""``[mcp]``: which web pages may call MCP servers, and where clients get a key; ``[[mcp_groups]]``: servers as one."""

import re
from typing import Annotated, Any

from msgspec import Meta, Struct

from gpuproxy.config import checks
from gpuproxy.config.kinds import Name, PositiveSeconds
from gpuproxy.config.reader import Faults


def web_origin(value: str) -> str | None:
    """Accept a web origin as browsers send it (RFC 6454 §6.2), or * for all."""
    if value in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-.0-~]+", value):
        return None
    return f"{checks.show(value)} is no origin; write https://HOST[:PORT] without a path, or *"


Origin = Annotated[str, Meta(extra={"check": web_origin})]
ServerUrl = Annotated[str, Meta(extra={"check": checks.base_url})]


class Mcp(Struct, forbid_unknown_fields=True, frozen=True):
    """What holds for all MCP upstreams."""

    allowed_origins: tuple[Origin, ...] = ()
    authorization_servers: tuple[ServerUrl, ...] = ()


class McpGroup(Struct, forbid_unknown_fields=True, frozen=True):
    """Several MCP upstreams that clients see as one. ``timeout_s`` is how long one may take before it is left out."""

    name: Name
    servers: tuple[Name, ...]
    timeout_s: PositiveSeconds = 10.0


SERVERS_MAX = 16  # of one group: each call that concerns all is as many


def check_groups(tree: dict[str, Any], faults: Faults) -> None:
    """Note what is wrong with groups beyond the types of their fields."""
    protocols = {str(each.get("name")): each.get("protocol") for each in _blocks(tree, "upstreams")}
    groups = {str(group.get("name")) for group in _blocks(tree, "mcp_groups")}
    for index, group in enumerate(_blocks(tree, "mcp_groups")):
        if protocols.get(str(group.get("name"))) == "mcp":
            name = checks.show(group["name"])
            faults.add(("mcp_groups", index, "name"), f"{name} is the name of an upstream; take another")
        servers = group.get("servers")
        if complaint := _wrong_servers(list(map(str, servers)) if isinstance(servers, list) else [], protocols, groups):
            faults.add(("mcp_groups", index, "servers"), complaint)


def unknown_servers(groups: tuple[McpGroup, ...], known: set[str]) -> list[str]:
    """Return a warning for each server of a group that the configuration does not know."""
    return [
        f"mcp_groups[{index}].servers: no upstream {name!r} here; it is left out until one is set over the API"
        for index, group in enumerate(groups)
        for name in group.servers
        if name not in known
    ]


def _blocks(tree: dict[str, Any], name: str) -> list[dict[str, Any]]:
    blocks = tree.get(name)
    return [each for each in blocks if isinstance(each, dict)] if isinstance(blocks, list) else []


def _wrong_servers(servers: list[str], protocols: dict[str, Any], groups: set[str]) -> str | None:
    if not 0 < len(servers) <= SERVERS_MAX or len(set(servers)) < len(servers):
        return f"name 1 to {SERVERS_MAX} upstreams, each once"
    for name in servers:
        if "__" in name:
            return f"{checks.show(name)} has __ in it, which parts server and tool; rename the upstream"
        if name in groups:  # one in a circle would call itself without end
            return f"{checks.show(name)} is a group; a group takes upstreams"
        if protocols.get(name, "mcp") != "mcp":
            return f"{checks.show(name)} speaks {protocols[name]}; a group takes upstreams of protocol mcp"
    return None
