"""Connections to one origin: an idle stack, a count, and the way to open another.

An origin is scheme, host and port; user-given and configured origins never share a pool, because only the
former are judged by the guard.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gpuproxy.errors import GatewayError
from gpuproxy.guard import Guard
from gpuproxy.observe.logs import get_logger
from gpuproxy.resolver import Resolver

if TYPE_CHECKING:
    from gpuproxy.proxy.upstream import UpstreamConnection

_log = get_logger("gpuproxy.pool")

ORIGINS_MAX = 4096  # user-given origins remembered; beyond it idle ones are forgotten


class OriginKey(NamedTuple):
    """What makes two connections interchangeable. `unix_path` is set instead of host and port for control."""

    scheme: str
    host: str
    port: int
    is_guarded: bool = False
    unix_path: str = ""


class ConnectPolicy(NamedTuple):
    """Bounds and exceptions that hold for every connection a worker opens; times in seconds."""

    connect_s: float
    dns_s: float
    connections_max: int
    connect_to: dict[str, str]
    guard: Guard
    resolver: Resolver
    guarded_resolver: Resolver  # for names that callers choose, and whose servers may be theirs


class Origin:
    """The pool of one origin."""

    __slots__ = ("_connections", "_make", "_policy", "_tls", "idle", "keepalive_s", "key", "label")

    def __init__(
        self,
        key: OriginKey,
        label: str,
        policy: ConnectPolicy,
        tls: ssl.SSLContext | None,
        make: Callable[["Origin"], "UpstreamConnection"],
        keepalive_s: float,
    ) -> None:
        self.key = key
        self.label = label
        self.keepalive_s = keepalive_s
        self.idle: dict[UpstreamConnection, None] = {}
        self._connections = 0
        self._policy = policy
        self._tls = tls
        self._make = make

    def take(self, now_s: float) -> "UpstreamConnection | None":
        """Return an idle connection that is still fresh, newest first; None if there is none."""
        idle = self.idle
        while idle:
            connection = idle.popitem()[0]
            if now_s < connection.idle_until_s and not connection.transport.is_closing():
                return connection
            connection.abort()
        return None

    def give(self, connection: "UpstreamConnection", now_s: float) -> None:
        """Put a connection that nobody has used yet on the idle stack."""
        connection.is_reused = True  # it may be closed by the time it is wanted, as any that was idle
        connection.idle_until_s = now_s + self.keepalive_s
        self.idle[connection] = None

    def forget(self, connection: "UpstreamConnection") -> None:
        """A connection is gone."""
        self.idle.pop(connection, None)
        self._connections -= 1

    def expire(self, now_s: float) -> None:
        """Close idle connections past their time."""
        for connection in [c for c in self.idle if c.idle_until_s <= now_s]:
            del self.idle[connection]
            connection.abort()

    def close(self) -> None:
        """Close every idle connection."""
        while self.idle:
            self.idle.popitem()[0].abort()

    @property
    def is_unused(self) -> bool:
        """Tell whether no connection, idle or busy, is open."""
        return self._connections == 0

    async def connect(self, connect_s: float | None = None) -> "UpstreamConnection":
        """Open a connection within `connect_s`, None: as the policy says.

        Raises GatewayError UPSTREAM_UNREACHABLE, _TIMEOUT, _BUSY or TARGET_FORBIDDEN.
        """
        connect_s = connect_s or self._policy.connect_s
        if self._connections >= self._policy.connections_max:
            raise GatewayError("UPSTREAM_BUSY", f"{self.label} has {self._connections} connections in use", 1)
        self._connections += 1
        try:
            async with asyncio.timeout(connect_s):
                return await self._open(asyncio.get_running_loop().time() + connect_s)
        except BaseException as error:
            self._connections -= 1
            raise self._mapped(error, connect_s) from error

    async def _open(self, give_up_s: float) -> "UpstreamConnection":
        loop = asyncio.get_running_loop()
        if self.key.unix_path:
            _, connection = await loop.create_unix_connection(lambda: self._make(self), self.key.unix_path)
            return connection
        failure: OSError = OSError("no address")
        addresses = await self._addresses()
        for left, (address, port) in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                async with asyncio.timeout((give_up_s - loop.time()) / left):  # a silent one leaves the others theirs
                    _, connection = await loop.create_connection(
                        lambda: self._make(self),
                        address,
                        port,
                        ssl=self._tls,
                        server_hostname=self.key.host if self._tls else None,
                    )
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure

    async def _addresses(self) -> list[tuple[str, int]]:
        key, policy = self.key, self._policy
        resolver = policy.guarded_resolver if key.is_guarded else policy.resolver
        guard = policy.guard if key.is_guarded else None
        try:
            return await resolver.places(key.host, key.port, policy.dns_s, policy.connect_to, guard)
        except TimeoutError:
            raise GatewayError("UPSTREAM_TIMEOUT", f"{self.label}: its name was not resolved in time") from None
        except OSError:
            raise GatewayError("UPSTREAM_UNREACHABLE", f"{self.label}: its name does not resolve") from None

    def _mapped(self, error: BaseException, connect_s: float) -> BaseException:
        if isinstance(error, TimeoutError):
            return GatewayError("UPSTREAM_TIMEOUT", f"{self.label} took no connection within {connect_s:g} s")
        if isinstance(error, ssl.SSLError | ssl.CertificateError):
            reason = getattr(error, "verify_message", "") or error.reason or "handshake failed"
            return GatewayError("UPSTREAM_UNREACHABLE", f"{self.label}: TLS: {reason}")
        if isinstance(error, OSError):
            _log.info("upstream refused", upstream=self.label, reason=str(error))
            if self.key.unix_path:
                return GatewayError("UNAVAILABLE", "the management plane is restarting", 1)
            return GatewayError("UPSTREAM_UNREACHABLE", f"{self.label} refuses connections")
        return error


class Pools:
    """All origins of a worker."""

    def __init__(
        self,
        policy: ConnectPolicy,
        make: Callable[[Origin], "UpstreamConnection"],
        keepalive_s: float,
        ca_file: str,
    ) -> None:
        self._policy = policy
        self._make = make
        self._keepalive_s = keepalive_s
        self._user_tls: ssl.SSLContext | None = None
        self._user_ca_file = ca_file
        self._origins: dict[OriginKey | tuple[OriginKey, str, str, bool], Origin] = {}

    def configured(
        self, key: OriginKey, label: str, ca_file: str = "", verify: bool = True, keepalive_s: float = 0
    ) -> Origin:
        """Return the pool of a configured upstream's origin; upstreams never share one (TLS settings differ)."""
        place = key, label, ca_file, verify
        origin = self._origins.get(place)
        if origin is None:
            tls = tls_context(ca_file, verify) if key.scheme == "https" else None
            origin = Origin(key, label, self._policy, tls, self._make, keepalive_s or self._keepalive_s)
            self._origins[place] = origin
        return origin

    def keep_only(self, used: "set[Origin]") -> None:
        """Forget configured origins that no upstream has any more, once their connections are gone."""
        for place in [place for place, origin in self._origins.items() if _is_over(place, origin, used)]:
            del self._origins[place]

    def user_given(self, scheme: str, host: str, port: int) -> Origin:
        """Return the pool of a user-given origin; an address literal is judged here, a name when it is resolved."""
        key = OriginKey(scheme, host, port, is_guarded=True)
        origin = self._origins.get(key)
        if origin is None:
            if len(self._origins) >= ORIGINS_MAX:
                self._forget_unused()
            tls = self._tls_for_users() if scheme == "https" else None
            origin = Origin(key, f"{scheme}://{host}:{port}", self._policy, tls, self._make, self._keepalive_s)
            self._origins[key] = origin
        return origin

    def expire(self, now_s: float) -> None:
        """Close idle connections past their time, on every origin."""
        for origin in self._origins.values():
            if origin.idle:
                origin.expire(now_s)

    def close(self) -> None:
        """Close all idle connections; no other can be made afterwards."""
        for origin in self._origins.values():
            origin.close()
        self._policy.resolver.close()
        self._policy.guarded_resolver.close()

    def _tls_for_users(self) -> ssl.SSLContext:
        if self._user_tls is None:
            self._user_tls = tls_context(self._user_ca_file)
        return self._user_tls

    def _forget_unused(self) -> None:
        for key in [key for key, origin in self._origins.items() if isinstance(key, OriginKey) and origin.is_unused]:
            del self._origins[key]


def _is_over(place: object, origin: Origin, used: "set[Origin]") -> bool:
    is_configured = not isinstance(place, OriginKey) and not origin.key.unix_path
    return is_configured and origin not in used and origin.is_unused


def tls_context(ca_file: str, verify: bool = True) -> ssl.SSLContext:
    """Return a client context: system roots plus `ca_file` if given, HTTP/1.1 by ALPN."""
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context
