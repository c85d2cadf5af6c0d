"""From the configuration to destinations: upstreams by name, models by every name of theirs, protocols."""

from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

from gpuproxy.config import Config, Model, Target, Upstream
from gpuproxy.plugin import ProtocolHandler
from gpuproxy.proxy.breaker import Replicas
from gpuproxy.proxy.destination import Destination, Terms
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.offers import FindPrice, typical_cost
from gpuproxy.proxy.pool import OriginKey, Pools


class Builder:
    """Builds all destinations of one configuration."""

    def __init__(
        self,
        config: Config,
        handler: Callable[[str], ProtocolHandler],
        pools: Pools,
        environment: Mapping[str, str],
        replicas: Replicas,
        find_price: FindPrice,
    ) -> None:
        self._config = config
        self._find_price = find_price
        self._handler = handler
        self._pools = pools
        self._environment = environment
        self._replicas = replicas
        self._upstreams = {upstream.name: upstream for upstream in config.upstreams}

    def upstreams(self) -> dict[str, Destination]:
        """Return the destination of each upstream by its name."""
        return {
            upstream.name: Destination(
                upstream.name,
                "",
                self._handler(upstream.protocol),
                list(self._endpoints(Target(upstream.name))),
                self._plain_terms(len(upstream.urls) > 1),
                self._replicas,
            )
            for upstream in self._config.upstreams
        }

    def protocols(self, upstreams: Mapping[str, Destination]) -> dict[str, Destination]:
        """Return for each protocol the destination of calls that name neither model nor upstream.

        It is the upstream's own where there is one; that of several has no name.
        """
        names: dict[str, list[str]] = {}
        for upstream in self._config.upstreams:
            names.setdefault(upstream.protocol, []).append(upstream.name)
        found = {}
        for protocol, each in names.items():
            if len(each) == 1:
                found[protocol] = upstreams[each[0]]
                continue
            endpoints = [endpoint for name in each for endpoint in self._endpoints(Target(name))]
            terms = self._plain_terms(has_choice=True)
            found[protocol] = Destination("", "", self._handler(protocol), endpoints, terms, self._replicas)
        return found

    def models(self) -> dict[str, Destination]:
        """Return the destination of each model, by its name and its aliases."""
        described = {model.name: model for model in self._config.models}
        short = {name: Model(name) for upstream in self._config.upstreams for name in upstream.models}
        found: dict[str, Destination] = {}
        for model in {**short, **described}.values():
            destination = self._model(model)
            found.update(dict.fromkeys((model.name, *model.aliases), destination))
        for model in described.values():
            place = found[model.name]
            place.fallbacks = tuple(found[name] for name in model.fallback)
            for other in place.fallbacks:
                other.stands_in_for += (place,)
            place.settle()
        return found

    def _model(self, model: Model) -> Destination:
        targets = [*model.targets]
        named = {target.upstream for target in targets}
        for upstream in self._config.upstreams:
            if model.name in upstream.models and upstream.name not in named:
                targets.append(Target(upstream.name))
        endpoints = [endpoint for target in targets for endpoint in self._endpoints(target, model)]
        name = targets[0].upstream if len({target.upstream for target in targets}) == 1 else ""
        protocol = self._upstreams[targets[0].upstream].protocol
        terms = self._terms(model, len(endpoints) > 1 or bool(model.fallback))

        def cost(endpoint: Endpoint) -> float:
            return typical_cost(self._find_price(model.name, endpoint.upstream))

        return Destination(name, model.name, self._handler(protocol), endpoints, terms, self._replicas, cost)

    def _plain_terms(self, has_choice: bool) -> Terms:
        """Return the terms of calls that name no model."""
        routing = self._config.routing
        if not has_choice:
            return Terms()
        return Terms(
            retry_on=frozenset(routing.retry_on),
            attempts_max=routing.attempts_max,
            budget_percent=routing.retry_budget_percent,
            is_idempotent_only=True,
        )

    def _terms(self, model: Model, has_choice: bool) -> Terms:
        routing = self._config.routing
        header = model.affinity_header or routing.affinity_header
        return Terms(
            model.strategy or routing.strategy,
            header.lower().encode(),
            frozenset(routing.retry_on if model.retry_on is None else model.retry_on) if has_choice else frozenset(),
            model.attempts_max or routing.attempts_max,
            routing.retry_budget_percent,
            routing.queue_max if model.queue_max is None else model.queue_max,
            model.queue_s or routing.queue_s,
            model.total_s or 0.0,
        )

    def _endpoints(self, target: Target, model: Model | None = None) -> Iterator[Endpoint]:
        upstream = self._upstreams[target.upstream]
        for url in upstream.urls:
            yield self._endpoint(url, upstream, target, model)

    def _endpoint(self, url: str, upstream: Upstream, target: Target, model: Model | None) -> Endpoint:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        key = OriginKey(parts.scheme, parts.hostname or "", port)
        origin = self._pools.configured(key, f"upstream {upstream.name!r}", upstream.ca_file, upstream.verify_tls)
        timeouts = self._config.timeouts
        first_byte_s = (model and model.first_byte_s) or upstream.first_byte_s or timeouts.first_byte_s
        idle_s = (model and model.idle_s) or upstream.idle_s or timeouts.idle_s
        replica = self._replicas.get(upstream.name, url)
        endpoint = Endpoint(origin, parts.netloc.encode(), first_byte_s, idle_s, replica)
        endpoint.base_path = parts.path.rstrip("/").encode()
        endpoint.fixed_fields = self._fixed_fields(upstream, target)
        endpoint.fixed_names = frozenset(name.lower().encode() for name in upstream.headers)
        endpoint.preserves_host = upstream.preserve_host
        endpoint.may_ask_usage = upstream.include_usage
        endpoint.upstream = upstream.name
        endpoint.weight, endpoint.priority = target.weight, target.priority
        endpoint.room = self._replicas.rooms.of(replica, target.concurrency_max)
        if model is not None:
            endpoint.model = target.name_there or model.name
            endpoint.connect_s = model.connect_s
        return endpoint

    def _fixed_fields(self, upstream: Upstream, target: Target) -> bytes:
        fields = dict(upstream.headers)
        variable = target.api_key_env or upstream.api_key_env
        key = self._environment.get(variable, "").strip() if variable else ""
        if key:
            fields["Authorization"] = f"Bearer {key}"
        return "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
