"""The URL below which clients find the gateway."""

from urllib.parse import urlsplit


def base_url(public_url: str, scheme: str, host: str) -> str:
    """Return `public_url`, or if that is empty what the call itself says: its scheme and Host."""
    return public_url.rstrip("/") or f"{'https' if scheme.strip().lower() == 'https' else 'http'}://{host.strip()}"


def origin_of(url: str) -> str:
    """Return the web origin of an http(s) URL as browsers send it (RFC 6454 §6.2), empty for an empty URL."""
    parts = urlsplit(url)
    standing = {"http": 80, "https": 443}.get(parts.scheme)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, standing) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}" if host else ""
