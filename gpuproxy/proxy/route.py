"""Where a call goes: from the request target to a route, from an intent to an endpoint.

A target is classified once and remembered, so a repeated path costs one dict look-up. Nothing here looks at
the clock, the network or the caller.
"""

import itertools
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from msgspec import Struct

from gpuproxy.config import Config, Timeouts, Upstream
from gpuproxy.errors import GatewayError
from gpuproxy.plugin import Intent, ProtocolHandler, Registry
from gpuproxy.proxy.pool import Origin, OriginKey, Pools, tls_context

PREFIX = b"/api/v1/gpu/proxy"
ALIAS = b"/v1/"  # /v1/... is short for PREFIX/v1/...
ROUTES_MAX = 4096  # targets remembered

CONTROL, ENVELOPE, MOUNT, UPSTREAM, UNKNOWN = range(5)


class Route(Struct, frozen=True, gc=False):
    """What a request target means. `path` is what the handler sees; `shown` is the target without its query."""

    kind: int
    handler: ProtocolHandler | None = None
    path: bytes = b""
    shown: str = ""
    upstream: "Destination | None" = None
    code: str = ""
    fault: str = ""


class Endpoint(Struct, frozen=True, gc=False):
    """One base URL of an upstream. `fixed_fields` are the header lines every request to it carries but Host."""

    origin: Origin
    base_path: bytes
    fixed_fields: bytes
    host: bytes
    preserves_host: bool = False


class Destination:
    """A configured upstream with its endpoints, taken in turn."""

    __slots__ = (
        "_turns",
        "config",
        "endpoint",
        "endpoints",
        "first_byte_s",
        "fixed_names",
        "handler",
        "idle_s",
        "may_ask_usage",
        "name",
    )

    def __init__(
        self, config: Upstream, handler: ProtocolHandler, endpoints: tuple[Endpoint, ...], timeouts: Timeouts
    ) -> None:
        self.config = config
        self.first_byte_s = config.first_byte_s or timeouts.first_byte_s
        self.idle_s = config.idle_s or timeouts.idle_s
        self.may_ask_usage = config.include_usage
        self.name = config.name
        self.handler = handler
        self.endpoints = endpoints
        self.fixed_names = frozenset(name.lower().encode() for name in config.headers)
        self._turns: Iterator[Endpoint] = itertools.cycle(endpoints)
        self.endpoint = self._turns.__next__  # returns the endpoint whose turn it is


class Router:
    """All routes and destinations of a worker."""

    def __init__(self, config: Config, registry: Registry, pools: Pools, environment: Mapping[str, str]) -> None:
        self.registry = registry
        self._timeouts = config.timeouts
        self.routes: dict[bytes, Route] = {}
        self._by_name: dict[str, Destination] = {}
        self._by_model: dict[str, list[Destination]] = {}
        self._by_protocol: dict[str, list[Destination]] = {}
        self._by_address: dict[tuple[str, str, int], Endpoint] = {}
        self._turn = itertools.count()
        for upstream in config.upstreams:
            self._add(upstream, pools, environment)

    def _add(self, upstream: Upstream, pools: Pools, environment: Mapping[str, str]) -> None:
        handler = self.handler(upstream.protocol)
        endpoints = tuple(_endpoint(url, upstream, pools, environment) for url in upstream.urls)
        destination = Destination(upstream, handler, endpoints, self._timeouts)
        self._by_name[upstream.name] = destination
        self._by_protocol.setdefault(upstream.protocol, []).append(destination)
        for endpoint in endpoints:
            key = endpoint.origin.key
            self._by_address.setdefault((key.scheme, key.host, key.port), endpoint)
        for model in upstream.models:
            self._by_model.setdefault(model, []).append(destination)

    def handler(self, protocol: str) -> ProtocolHandler:
        """Return the handler of a protocol. Raises GatewayError UNKNOWN_PROTOCOL naming the known ones."""
        handler = self.registry.protocols.get(protocol)
        if handler is None:
            known = ", ".join(sorted(self.registry.protocols)) or "none"
            raise GatewayError("UNKNOWN_PROTOCOL", f"no protocol {protocol[:100]!r}; known: {known}", param="protocol")
        return handler

    def route(self, target: bytes) -> Route:
        """Classify a request target (origin form, with query) and remember it in `routes`."""
        route = self._classify(target)
        if len(self.routes) >= ROUTES_MAX:
            self.routes.clear()
        if len(target) <= 256:
            self.routes[target] = route
        return route

    def _classify(self, target: bytes) -> Route:
        path = target.partition(b"?")[0]
        shown = path[:200].decode("latin-1")
        if path.startswith(ALIAS):
            return self._mount(target, shown)
        if path in (PREFIX, PREFIX + b"/"):
            return Route(ENVELOPE, shown=shown)
        if path.startswith(PREFIX + b"/"):
            rest = target[len(PREFIX) :]
            if rest.startswith(b"/upstreams/"):
                return self._named(rest, shown)
            return self._mount(rest, shown)
        return Route(CONTROL, shown=shown)

    def _mount(self, rest: bytes, shown: str) -> Route:
        segment = rest[1:].split(b"?", 1)[0].split(b"/", 1)[0].decode("latin-1")
        handler = self.registry.mounts.get(segment)
        if handler is None:
            known = ", ".join(sorted((*self.registry.mounts, "upstreams")))
            return Route(
                UNKNOWN,
                shown=shown,
                code="NOT_FOUND",
                fault=f"no route {shown!r}; below {PREFIX.decode()}/ are: {known}",
            )
        return Route(MOUNT, handler, rest, shown)

    def _named(self, rest: bytes, shown: str) -> Route:
        name_bytes, slash, path = rest[len(b"/upstreams/") :].partition(b"/")
        if not slash:
            name_bytes, mark, query = name_bytes.partition(b"?")
            path = mark + query
        try:
            destination = self.upstream(name_bytes.decode("latin-1"))
        except GatewayError as error:
            return Route(UNKNOWN, shown=shown, code=error.code, fault=error.message)
        return Route(UPSTREAM, destination.handler, slash + path, shown, destination)

    def upstream(self, name: str) -> Destination:
        """Return the upstream of that name. Raises GatewayError UNKNOWN_UPSTREAM."""
        destination = self._by_name.get(name)
        if destination is None:
            raise GatewayError(
                "UNKNOWN_UPSTREAM",
                f"no upstream {name[:100]!r}; known: {_names(self._by_name)}",
                param="upstream",
            )
        return destination

    def endpoint_at(self, scheme: str, host: str, port: int) -> Endpoint | None:
        """Return the configured endpoint at this address, if there is one: it needs no guard."""
        return self._by_address.get((scheme, host, port))

    def destination(self, intent: Intent, handler: ProtocolHandler) -> Destination:
        """Return the upstream an intent means. Raises GatewayError UNKNOWN_MODEL or UNKNOWN_UPSTREAM."""
        choices = self._by_model.get(intent.model)
        if choices is not None and len(choices) == 1 and not intent.upstream:
            return choices[0]
        if intent.upstream:
            destination = self.upstream(intent.upstream)
            if destination.handler is not handler:
                served = [name for name, other in self._by_name.items() if other.handler is handler]
                raise GatewayError(
                    "UNKNOWN_UPSTREAM",
                    f"upstream {intent.upstream!r} speaks {destination.config.protocol}; known here: {_names(served)}",
                    param="upstream",
                )
            return destination
        if intent.model:
            if choices is None:
                raise GatewayError(
                    "UNKNOWN_MODEL",
                    f"no model {intent.model[:100]!r}; known: {_names(self._by_model)}",
                    param="model",
                )
        else:
            choices = self._by_protocol.get(handler.name)
            if choices is None:
                raise GatewayError("UNKNOWN_UPSTREAM", f"no upstream speaks {handler.name}; add one to [[upstreams]]")
        if len(choices) == 1:
            return choices[0]
        return choices[next(self._turn) % len(choices)]


def _names(known: "Mapping[str, object] | list[str]") -> str:
    names = sorted(known)
    shown = ", ".join(names[:20]) or "none"
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _endpoint(url: str, upstream: Upstream, pools: Pools, environment: Mapping[str, str]) -> Endpoint:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    tls = tls_context(upstream.ca_file, upstream.verify_tls) if parts.scheme == "https" else None
    origin = pools.configured(OriginKey(parts.scheme, host, port), f"upstream {upstream.name!r}", tls)
    fields = dict(upstream.headers)
    key = environment.get(upstream.api_key_env, "") if upstream.api_key_env else ""
    if key:
        fields["Authorization"] = f"Bearer {key}"
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    base_path = parts.path.rstrip("/").encode()
    return Endpoint(origin, base_path, lines.encode(), parts.netloc.encode(), upstream.preserve_host)


def _refuse_climbing(path: bytes) -> None:
    segments = path.partition(b"?")[0].lower().replace(b"%2e", b".").replace(b"%2f", b"/").split(b"/")
    if b".." in segments or b"." in segments:
        raise GatewayError("BAD_REQUEST", "the path has dot segments; this upstream serves only what is below its URL")


def joined_path(base_path: bytes, path: bytes) -> bytes:
    """Return the target below a base path; a base that ends in /v1 does not get a second one.

    An empty `path` means the base itself, a `path` that is only a query is appended to it. Raises GatewayError
    BAD_REQUEST for a path with dot segments: what is below a base path must not climb out of it.
    """
    if not base_path:
        return path if path.startswith(b"/") else b"/" + path
    if b"/." in path or b"%2" in path:
        _refuse_climbing(path)
    if base_path.endswith(b"/v1") and path.startswith((b"/v1/", b"/v1?")):
        path = path[3:]
    return base_path + path
