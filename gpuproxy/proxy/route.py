"""Where a call goes: from the request target to a route, from an intent to an endpoint.

A target is classified once and remembered, so a repeated path costs one dict look-up. Nothing here looks at
the clock, the network or the caller.
"""

from collections.abc import Mapping

from msgspec import Struct

from gpuproxy.codec.paths import has_dot_segments
from gpuproxy.config import Config
from gpuproxy.errors import GatewayError
from gpuproxy.plugin import PROXY_PREFIX, Intent, ModelOffer, Pin, ProtocolHandler, Registry
from gpuproxy.proxy import instances
from gpuproxy.proxy.breaker import Replicas
from gpuproxy.proxy.destination import Destination
from gpuproxy.proxy.destinations import Builder
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.offers import FindPrice, offer
from gpuproxy.proxy.pool import Origin, Pools
from gpuproxy.proxy.served import served_by_upstreams

PREFIX = PROXY_PREFIX
ALIAS = b"/v1/"  # /v1/... is short for PREFIX/v1/...
ROUTES_MAX = 4096  # targets remembered
# What SDKs call below their base URL: where one lacks its /v1, they show an error only if it speaks their dialect.
_SDK_ROUTES = (b"/chat/completions", b"/completions", b"/embeddings", b"/responses")

CONTROL, ENVELOPE, MOUNT, UPSTREAM, UNKNOWN, INSTANCE = range(6)


class Route(Struct, frozen=True, gc=False):
    """What a request target means. `path` is what the handler sees; `shown` is the target without its query.

    Of one that is unknown `speaker` is who refuses it, if it is called by a protocol's clients.
    """

    kind: int
    handler: ProtocolHandler | None = None
    path: bytes = b""
    shown: str = ""
    upstream: "Destination | None" = None
    code: str = ""
    fault: str = ""
    contract_id: str = ""  # of a rented machine, with a port inside
    port: int = 0
    speaker: ProtocolHandler | None = None


class Router:
    """All routes and destinations of a worker."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        pools: Pools,
        environment: Mapping[str, str],
        replicas: Replicas | None = None,
        find_price: FindPrice = lambda model, upstream: None,
    ) -> None:
        self.registry = registry
        self.config = config
        self.find_price = find_price
        self.routes: dict[bytes, Route] = {}
        self._groups = {b"/mcp/" + group.name.encode() for group in config.mcp_groups}  # control's work
        replicas = replicas or Replicas(config.routing)
        builder = Builder(config, self.handler, pools, environment, replicas, find_price)
        self.upstreams = builder.upstreams()
        self.models = builder.models()  # by every name of them
        for name, served in served_by_upstreams(self.models).items():
            self.upstreams[name].served = served
        self._by_protocol = builder.protocols(self.upstreams)
        self.probed = [
            (endpoint, upstream.probe_path.encode())
            for upstream in config.upstreams
            if upstream.probe_path
            for endpoint in self.upstreams[upstream.name].endpoints
        ]
        self._pinned: dict[tuple[str, str, bool], Destination] = {}
        self._by_address: dict[tuple[str, str, int], Endpoint] = {}
        for destination in self.upstreams.values():
            for endpoint in destination.endpoints:
                key = endpoint.origin.key
                self._by_address.setdefault((key.scheme, key.host, key.port), endpoint)

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
            if rest.startswith(instances.PREFIX):
                return self._rented(rest, shown)
            if self._groups and path[len(PREFIX) :].removesuffix(b"/") in self._groups:
                return Route(CONTROL, shown=shown)
            return self._mount(rest, shown)
        if path in _SDK_ROUTES:
            return self._unknown(path, shown, "NOT_FOUND", f"no path {shown!r}; the base URL of SDKs ends in /v1 here")
        return Route(CONTROL, shown=shown)

    def _unknown(self, path: bytes, shown: str, code: str, fault: str) -> Route:
        is_of_sdk = b"/v1/" in path or path.partition(b"?")[0] in _SDK_ROUTES
        speaker = self.registry.mounts.get("v1") if is_of_sdk else None
        return Route(UNKNOWN, path=path, shown=shown, code=code, fault=fault, speaker=speaker)

    def _mount(self, rest: bytes, shown: str) -> Route:
        segment = rest[1:].split(b"?", 1)[0].split(b"/", 1)[0].decode("latin-1")
        handler = self.registry.mounts.get(segment)
        if handler is None:
            known = ", ".join(sorted((*self.registry.mounts, "upstreams", "instances")))
            fault = f"no route {shown!r}; below {PREFIX.decode()}/ are: {known}"
            return self._unknown(rest, shown, "NOT_FOUND", fault)
        return Route(MOUNT, handler, rest, shown)

    def _named(self, rest: bytes, shown: str) -> Route:
        name_bytes, slash, path = rest[len(b"/upstreams/") :].partition(b"/")
        if not slash:
            name_bytes, mark, query = name_bytes.partition(b"?")
            path = mark + query
        try:
            destination = self.upstream(name_bytes.decode("latin-1"))
        except GatewayError as error:
            return self._unknown(slash + path, shown, error.code, error.message)
        return Route(UPSTREAM, destination.handler, slash + path, shown, destination)

    def _rented(self, rest: bytes, shown: str) -> Route:
        try:
            contract_id, port, path = instances.split_target(rest)
            mount = path[1:].partition(b"/")[0].decode("latin-1")
            handler = self.registry.mounts.get(mount) if mount in ("v1", "v2") else None
            handler = handler or self.handler("https")
        except GatewayError as error:
            return self._unknown(rest, shown, error.code, error.message)
        return Route(INSTANCE, handler, path, shown, contract_id=contract_id, port=port)

    def upstream(self, name: str) -> Destination:
        """Return the upstream of that name. Raises GatewayError UNKNOWN_UPSTREAM."""
        destination = self.upstreams.get(name)
        if destination is None:
            raise GatewayError(
                "UNKNOWN_UPSTREAM",
                f"no upstream {name[:100]!r}; known: {_names(self.upstreams)}",
                param="upstream",
            )
        return destination

    def pinned(self, destination: Destination, pin: Pin) -> Destination | None:
        """Return `destination` with the pin's server only, None if it has that no more."""
        key = pin.upstream, pin.url, pin.is_whole_path
        found = self._pinned.get(key)
        if found is None:
            endpoint = destination.endpoint_of(pin.upstream, pin.url)
            if endpoint is None:
                return None
            found = self._pinned[key] = destination.narrowed(endpoint.whole() if pin.is_whole_path else endpoint)
        return found

    def offers(self, handler: ProtocolHandler, models: tuple[str, ...] | None) -> list[ModelOffer]:
        """Return what a caller who may use `models` (None: all) is offered in a protocol, sorted by name.

        Models have one offer, under their own name; who may use them by aliases only is offered those.
        """
        served = [(name, place) for name, place in sorted(self.models.items()) if place.handler is handler]
        aliases: dict[str, list[str]] = {}
        for name, place in served:
            if name != place.model:
                aliases.setdefault(place.model, []).append(name)
        return [
            offer(
                name,
                place.model,
                {each.upstream for each in place.endpoints},
                self.find_price,
                tuple(aliases.get(name, ())),
            )
            for name, place in served
            if (name == place.model if models is None or place.model in models else name in models)
        ]

    def origins(self) -> set[Origin]:
        """Return the origins of all endpoints."""
        return {endpoint.origin for place in self.upstreams.values() for endpoint in place.endpoints}

    def endpoint_at(self, scheme: str, host: str, port: int) -> Endpoint | None:
        """Return the configured endpoint at this address, if there is one: it needs no guard."""
        return self._by_address.get((scheme, host, port))

    def destination(self, intent: Intent, handler: ProtocolHandler) -> Destination:
        """Return the upstream an intent means. Raises GatewayError UNKNOWN_MODEL or UNKNOWN_UPSTREAM."""
        if not intent.upstream:
            destination = self.models.get(intent.model) if intent.model else self._by_protocol.get(handler.name)
            if destination is not None:
                return destination
            if not intent.model:
                raise GatewayError("UNKNOWN_UPSTREAM", f"no upstream speaks {handler.name}; add one to [[upstreams]]")
            known = f"known: {_names(self.models)}"
            raise GatewayError("UNKNOWN_MODEL", f"no model {intent.model[:100]!r}; {known}", param="model")
        destination = self.upstream(intent.upstream)
        if destination.handler is not handler:
            served = [name for name, other in self.upstreams.items() if other.handler is handler]
            raise GatewayError(
                "UNKNOWN_UPSTREAM",
                f"upstream {intent.upstream!r} speaks {destination.handler.name}; known here: {_names(served)}",
                param="upstream",
            )
        return destination

    def nameless(self, handler: ProtocolHandler) -> GatewayError:
        """Return the refusal of a call to change something that may be at any of several upstreams."""
        names = _names([name for name, other in self.upstreams.items() if other.handler is handler])
        what = f"the request names no model; call an upstream by its name, below {PREFIX.decode()}/upstreams/"
        return GatewayError("BAD_REQUEST", f"{what}: {names}", param="model")


def _names(known: "Mapping[str, object] | list[str]") -> str:
    names = sorted(known)
    shown = ", ".join(names[:20]) or "none"
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _refuse_climbing(path: bytes) -> None:
    if has_dot_segments(path):
        raise GatewayError("BAD_REQUEST", "the path has dot segments; this upstream serves only what is below its URL")


def joined_path(base_path: bytes, path: bytes) -> bytes:
    """Return the target below a base path; a base that ends in /v1 does not get a second one.

    An empty `path` means the base itself, a `path` that is only a query is appended to it. Raises GatewayError
    BAD_REQUEST for a path with dot segments: what is below a base path must not climb out of it.
    """
    if not base_path:
        return path if path.startswith(b"/") else b"/" + path
    if b"/." in path or b"%" in path or b"\\" in path:
        _refuse_climbing(path)
    if base_path.endswith(b"/v1") and path.startswith((b"/v1/", b"/v1?")):
        path = path[3:]
    return base_path + path
