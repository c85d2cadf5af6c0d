"""Whether the plugins can do what upstreams and models are configured for."""

from collections.abc import Iterator

from gpuproxy.config import Config, Model
from gpuproxy.plugin.models import ModelRenamer
from gpuproxy.plugin.registry import Registry


def routing_faults(config: Config, registry: Registry) -> list[str]:
    """Return what is wrong with the protocols of upstreams and the names of models, each fault with its remedy."""
    protocols = registry.protocols
    known = ", ".join(sorted(protocols)) or "none"
    faults = [
        f"upstreams[{index}].protocol: no plugin speaks {upstream.protocol!r}; known: {known}"
        for index, upstream in enumerate(config.upstreams)
        if upstream.protocol not in protocols
    ]
    renaming = {name for name, handler in protocols.items() if isinstance(handler, ModelRenamer)}
    spoken = {upstream.name: upstream.protocol for upstream in config.upstreams}
    short = {model: upstream.protocol for upstream in config.upstreams for model in upstream.models}
    for index, model in enumerate(config.models):
        protocol = spoken.get(model.targets[0].upstream, "") if model.targets else short.get(model.name, "")
        if protocol in protocols and protocol not in renaming:
            faults += [_cannot_rename(f"models[{index}].{key}", protocol, renaming) for key in _renaming_keys(model)]
    return faults


def _renaming_keys(model: Model) -> Iterator[str]:
    """Yield the keys that let a call name the model otherwise than its upstream knows it."""
    if model.aliases:
        yield "aliases"
    if model.fallback:
        yield "fallback"
    for at, target in enumerate(model.targets):
        if target.name_there and target.name_there != model.name:
            yield f"targets[{at}].as"


def _cannot_rename(place: str, protocol: str, renaming: set[str]) -> str:
    able = ", ".join(sorted(renaming)) or "no protocol that is switched on"
    return f"{place}: calls of protocol {protocol!r} cannot name a model otherwise; take it out (able: {able})"
