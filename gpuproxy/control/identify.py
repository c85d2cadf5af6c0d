"""Who calls the management API, and from where."""

import ipaddress

from aiohttp import web

from gpuproxy.access import tokens
from gpuproxy.access.callers import Caller, caller_by_key, caller_by_token
from gpuproxy.codec.key import digest_of, is_well_formed
from gpuproxy.control.parts import CONFIG, KEYRING, STORE
from gpuproxy.errors import GatewayError


async def identify(request: web.Request) -> Caller:
    """Return who holds the API key or access token in X-API-Key or Authorization: Bearer.

    Raises GatewayError UNAUTHORIZED, BAD_REQUEST for two credentials that differ.
    """
    return await caller_of(request.app, _credential(request))


async def caller_of(app: web.Application, credential: str) -> Caller:
    """Return who holds this API key or access token. Raises GatewayError UNAUTHORIZED."""
    if tokens.looks_like_token(credential):
        claims = tokens.read(app[KEYRING], credential)
        caller = await caller_by_token(app[STORE], claims)
    else:
        key = credential.encode(errors="surrogateescape")
        caller = await caller_by_key(app[STORE], digest_of(key)) if is_well_formed(key) else None
    if caller is None:
        kind = "access token" if tokens.looks_like_token(credential) else "API key"
        raise GatewayError("UNAUTHORIZED", f"the {kind} is unknown, expired or revoked")
    return caller


def _credential(request: web.Request) -> str:
    keys = {value.strip() for value in request.headers.getall("X-API-Key", ()) if value.strip()}
    given = keys | {_bearer(value) for value in request.headers.getall("Authorization", ())} - {""}
    if len(given) > 1:
        raise GatewayError("BAD_REQUEST", "X-API-Key and Authorization carry different credentials; send one")
    if not given:
        raise GatewayError("UNAUTHORIZED", "no credential; send X-API-Key: KEY or Authorization: Bearer KEY")
    return given.pop()


def _bearer(value: str) -> str:
    scheme, _, credential = value.partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def address_of(request: web.Request) -> str:
    """Return the address of the client: the last one in X-Forwarded-For that is no trusted proxy's.

    Only workers reach control; they put the peer's address last, and keep what came before only from a trusted proxy.
    """
    chain = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")
    addresses = [each.strip() for each in chain if each.strip()]
    trusted = request.app[CONFIG].server.trusted_proxies
    for address in reversed(addresses):
        if not _is_in(address, trusted):
            return address
    return addresses[0] if addresses else ""


def _is_in(address: str, networks: tuple[str, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in ipaddress.ip_network(network) for network in networks)
