"""What a single value of the configuration must look like; each check returns a complaint or None.

A complaint names the value and the remedy, and shows nothing that may hold a credential.
"""

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMATS = ("text", "json")
WRITTEN_HEADERS = {
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
}
STORE_SCHEMES = ("sqlite", "postgresql", "postgres")
REDIS_SCHEMES = ("redis", "rediss", "unix")

Check = Callable[[str], str | None]


def show(value: Any) -> str:
    """Return the value as it could stand in a message: JSON, at most 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_of(known: tuple[str, ...]) -> Check:
    """Return a check that accepts only the values given."""
    return lambda value: None if value in known else f"{show(value)} is unknown; known: {', '.join(known)}"


def text(value: str) -> str | None:
    """Accept printable text without space around it."""
    if value and value.strip() == value and value.isprintable():
        return None
    return f"{show(value)} is empty or has stray white space"


def optional_text(value: str) -> str | None:
    """Accept printable text without space around it, or nothing."""
    return text(value) if value else None


def upstream_name(value: str) -> str | None:
    """Accept what can stand in a path and a metric label."""
    if re.fullmatch(r"[a-z0-9._-]{1,64}", value):
        return None
    return f"{show(value)} is no name; use 1 to 64 of a-z 0-9 . _ -"


def optional_upstream_name(value: str) -> str | None:
    """Accept an upstream's name, or nothing."""
    return upstream_name(value) if value else None


def base_url(value: str) -> str | None:
    """Accept an absolute http(s) URL to which a path can be appended."""
    remedy = "write http://HOST[:PORT][/PATH]"
    if not re.fullmatch(r"[!-~]+", value):
        return f"{show(value)} is not a URL in printable ASCII; {remedy}"
    if "@" in value:
        return f"carries a user name or password; take it out and use api_key_env or headers ({remedy})"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        return f"{show(value)} is no URL: {error}; {remedy}"
    if parts.scheme not in ("http", "https"):
        return f"{show(value)} is neither http nor https; {remedy}"
    if not parts.hostname:
        return f"{show(value)} has no host; {remedy}"
    if port == 0 or parts.netloc.endswith(":"):
        return f"{show(value)} has no usable port; {remedy}"
    if "?" in value or "#" in value:
        return f"{show(value)} has a query or fragment, which a base URL cannot carry; {remedy}"
    return None


def page_origin(value: str) -> str | None:
    """Accept where a page comes from, as browsers say it in Origin (RFC 6454 §6.2)."""
    if re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", value):
        return None
    return f"{show(value)} is no origin of a page; write https://HOST[:PORT] in small letters and without a path"


def optional_base_url(value: str) -> str | None:
    """Accept a base URL, or nothing."""
    return base_url(value) if value else None


def optional_path(value: str) -> str | None:
    """Accept a path with its query below a base URL, or nothing."""
    return None if re.fullmatch(r"(/[!-~]*)?", value) else f"{show(value)} is no path; write /PATH"


def field_name(value: str) -> str | None:
    """Accept the name of a header field (RFC 9110 §5.1)."""
    return header(value, "")


def option(name: str, value: str) -> str | None:
    """Accept a provider's option; what it may say only its plugin knows."""
    return text(name) or (text(value) if value else None)


def store_url(value: str) -> str | None:
    """Accept a database URL of a known scheme."""
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in STORE_SCHEMES:
        given = show(scheme if separator else "")
        return f"unknown scheme {given}; write sqlite:///./FILE or postgresql://USER:PASSWORD@HOST/NAME"
    if scheme == "sqlite" and (not rest.startswith("/") or rest in ("/", "/:memory:")):
        return "names no file; write sqlite:///./FILE (relative) or sqlite:////DIRECTORY/FILE"
    return None if scheme == "sqlite" else _postgresql_url(value)


def _postgresql_url(value: str) -> str | None:
    place = value.partition("://")[2].rpartition("@")[2]  # what stands before may be any password
    try:
        parts = urlsplit(f"//{place}")
        is_usable = parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        return "has no usable host or port; write postgresql://USER:PASSWORD@HOST:5432/NAME"
    unknown = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name != "sslmode"]
    return f"has the parameter {show(unknown[0])}; only sslmode is understood" if unknown else None


def redis_url(value: str) -> str | None:
    """Accept a Redis URL, or nothing."""
    if not value:
        return None
    remedy = "write redis://[:PASSWORD@]HOST:6379/0, rediss://… or unix:///PATH"
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in REDIS_SCHEMES:
        return f"unknown scheme {show(scheme if separator else '')}; {remedy}"
    try:
        port = urlsplit(value).port
    except ValueError:
        port = 0
    return f"has no usable host or port; {remedy}" if port == 0 or not rest.strip("/") else None


def usd(value: str) -> str | None:
    """Accept dollars that are a whole number of nanodollars, written out; nothing stands for none."""
    if re.fullmatch(r"([0-9]{1,6}(\.[0-9]{1,9})?)?", value):
        return None
    return f'{show(value)} is no price; write dollars such as "0.15", under a million and with up to 9 decimals'


def percent(value: str) -> str | None:
    """Accept a percentage with up to three decimals, written out; nothing stands for none."""
    if re.fullmatch(r"([0-9]{1,4}(\.[0-9]{1,3})?)?", value):
        return None
    return f'{show(value)} is no percentage; write "12.5", under 10000 and with up to 3 decimals'


def network(value: str) -> str | None:
    """Accept an IPv4 or IPv6 network or single address."""
    try:
        ipaddress.ip_network(value)
    except ValueError as error:
        return f"{show(value)} is no network ({error}); write ADDRESS/BITS"
    return None


def readable_file(value: str) -> str | None:
    """Accept a file that can be opened now, or nothing."""
    if not value:
        return None
    try:
        with open(value, "rb"):
            return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"{show(value)} cannot be read: {reason}"


def variable_name(value: str) -> str | None:
    """Accept the name of an environment variable, or nothing."""
    if re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", value):
        return None
    return "is no variable name; write the NAME of an environment variable here, never the key itself"


def connection(source: str, target: str) -> str | None:
    """Accept a pair of HOST:PORT."""
    for value in (source, target):
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", value)
        if not found or not 1 <= int(found[2]) <= 65_535:
            return f'{show(value)} is not HOST:PORT; write "name.example:443" = "127.0.0.1:8443"'
    return None


def header(name: str, value: str) -> str | None:
    """Accept a field name and value that can be sent as they are (RFC 9110 §5)."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        return "is no header name (RFC 9110 §5.1)"
    if name.lower() in WRITTEN_HEADERS:
        return "is written by the gateway; leave it out (Host is that of urls, or the client's with preserve_host)"
    if not re.fullmatch(r"([!-~]([\t -~]*[!-~])?)?", value):
        return "its value has characters outside printable ASCII, or space around it"
    return None


def priced(model: str, tool: str, price: Mapping[str, Any]) -> str | None:
    """Accept a price of either a model or a tool; calls of tools have no tokens."""
    if bool(model) == bool(tool):
        return "a price is of a model or of a tool; write one of the two"
    if tool and any(price.get(name) for name in price if name.endswith("_per_million")):
        return f"calls of the tool {show(tool)} have no tokens; use per_request_usd or per_second_usd"
    return None
