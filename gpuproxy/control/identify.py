"""Who calls the management API."""

from aiohttp import web

from gpuproxy.access.accounts import grant_for
from gpuproxy.codec.key import digest_of, is_well_formed
from gpuproxy.control.parts import STORE
from gpuproxy.errors import GatewayError
from gpuproxy.types import Grant


async def caller(request: web.Request) -> Grant:
    """Return the grant of the key in X-API-Key or Authorization: Bearer. Raises GatewayError UNAUTHORIZED."""
    key = _credential(request).encode()
    grant = await grant_for(request.app[STORE], digest_of(key)) if is_well_formed(key) else None
    if grant is None:
        raise GatewayError("UNAUTHORIZED", "the API key is unknown, expired or revoked")
    return grant


def _credential(request: web.Request) -> str:
    key = request.headers.get("X-API-Key")
    if key:
        return key.strip()
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise GatewayError("UNAUTHORIZED", "no credential; send X-API-Key: KEY or Authorization: Bearer KEY")
    return credential.strip()
