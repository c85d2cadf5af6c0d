"""``[mcp]``: which web pages may call MCP servers, and where clients can get a key."""

import re
from typing import Annotated

from msgspec import Meta, Struct

from gpuproxy.config import checks


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
