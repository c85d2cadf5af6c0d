"""``[[models]]``: which upstreams serve a model, under which name and terms; and what must hold between the blocks.

A model may also be named in ``models`` of an upstream, the short form: that upstream is then one more target of it.
"""

from collections.abc import Container, Iterable, Iterator
from typing import Annotated, Any, TypeGuard

from msgspec import Meta, Struct, field

from gpuproxy.config.checks import show
from gpuproxy.config.kinds import Name, OptionalText, PositiveSeconds, Text, VariableName
from gpuproxy.config.reader import Faults, unknown
from gpuproxy.config.routing import Attempts, FieldName, QueueLength, Reason, Strategy


class Target(Struct, forbid_unknown_fields=True, frozen=True):
    """An upstream that serves the model.

    Of the targets with the lowest ``priority`` each gets calls by its ``weight``; the next ones are used when none
    of these can. ``as`` is the model's name there. ``concurrency_max`` bounds the calls at once to each of its URLs,
    over all workers of a machine and whatever else is called there; 0: no bound.
    """

    upstream: Name
    weight: Annotated[int, Meta(ge=1, le=100)] = 1
    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    name_there: OptionalText = field(default="", name="as")
    api_key_env: VariableName = ""
    concurrency_max: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class Model(Struct, forbid_unknown_fields=True, frozen=True):
    """A model as callers name it. What is None is as ``[routing]``, the upstream or ``[timeouts]`` say."""

    name: Text
    aliases: tuple[Text, ...] = ()
    targets: tuple[Target, ...] = ()
    fallback: tuple[Text, ...] = ()
    strategy: Strategy | None = None
    affinity_header: FieldName | None = None
    connect_s: PositiveSeconds | None = None
    first_byte_s: PositiveSeconds | None = None
    idle_s: PositiveSeconds | None = None
    total_s: PositiveSeconds | None = None
    queue_max: QueueLength | None = None
    queue_s: PositiveSeconds | None = None
    retry_on: tuple[Reason, ...] | None = None
    attempts_max: Attempts | None = None


def check_models(tree: Any, faults: Faults) -> None:
    """Note what does not fit together in models and upstreams; `tree` is what was written, right or wrong."""
    if not isinstance(tree, dict):
        return
    upstreams = {block["name"]: block for _, block in _items(tree, "upstreams") if _is_text(block.get("name"))}
    short: dict[str, str] = {}  # and where each is named first
    for index, block in _items(tree, "upstreams"):
        for model in _texts(block.get("models")):
            short.setdefault(model, f"upstreams[{index}].models")
    _check_names(tree, short, faults)
    known = short.keys() | {block["name"] for _, block in _items(tree, "models") if _is_text(block.get("name"))}
    protocols = _protocols(tree, upstreams)
    for index, block in _items(tree, "models"):
        place = ("models", index)
        _check_targets(place, block, upstreams, short, faults)
        for at, other in enumerate(_texts(block.get("fallback"))):
            _check_fallback((*place, "fallback", at), block, other, known, protocols, faults)


def _check_names(tree: dict[str, Any], short: dict[str, str], faults: Faults) -> None:
    """A name means one model: neither a name nor an alias may stand twice."""
    taken = dict(short)
    for index, block in _items(tree, "models"):
        name = block.get("name")
        if _is_text(name):
            if taken.get(name, "").startswith("models["):
                faults.add(("models", index, "name"), f"{show(name)} stands at {taken[name]} already; rename one")
            taken[name] = f"models[{index}]"
    for index, block in _items(tree, "models"):
        for at, alias in enumerate(_texts(block.get("aliases"))):
            place = taken.setdefault(alias, f"models[{index}].aliases[{at}]")
            if place != f"models[{index}].aliases[{at}]":
                faults.add(("models", index, "aliases", at), f"{show(alias)} stands at {place} already; rename one")


def _check_targets(
    place: tuple[str | int, ...],
    block: dict[str, Any],
    upstreams: dict[str, Any],
    short: Container[str],
    faults: Faults,
) -> None:
    seen: dict[tuple[str, str], int] = {}
    first = ""
    targets = list(_items(block, "targets"))
    if not targets and _is_text(block.get("name")) and block["name"] not in short and "targets" not in block:
        faults.add(place, f'no upstream serves {show(block["name"])}; write targets = [{{ upstream = "NAME" }}]')
    if not targets and isinstance(block.get("targets"), list):
        faults.add((*place, "targets"), 'is empty; write at least one of { upstream = "NAME" }')
    for at, target in targets:
        name, here = target.get("upstream"), (*place, "targets", at, "upstream")
        if not _is_text(name):
            continue
        if name not in upstreams:
            faults.add(here, unknown("upstream", name, upstreams))
            continue
        key = (name, str(target.get("as", "")))
        if seen.setdefault(key, at) != at:
            faults.add(here, f"{show(name)} is the target of targets[{seen[key]}] already; give that one more weight")
        protocol = str(upstreams[name].get("protocol", ""))
        first = first or protocol
        if protocol != first:
            faults.add(here, f"{show(name)} speaks {protocol}, the targets before it {first}; all must speak one")


def _check_fallback(
    place: tuple[str | int, ...],
    block: dict[str, Any],
    other: str,
    known: Iterable[str],
    protocols: dict[str, str],
    faults: Faults,
) -> None:
    name = block.get("name")
    if other not in known:
        faults.add(place, unknown("model", other, known))
    elif other == name:
        faults.add(place, f"{show(other)} is the model itself; name another one")
    elif _is_text(name) and protocols.get(other) != protocols.get(name):
        faults.add(place, f"{show(other)} speaks {protocols.get(other)}, {show(name)} {protocols.get(name)}")


def _protocols(tree: dict[str, Any], upstreams: dict[str, Any]) -> dict[str, str]:
    """Return what each model speaks, by its first target."""
    found: dict[str, str] = {}
    for _, block in _items(tree, "models"):
        for _, target in _items(block, "targets"):
            served = upstreams.get(target["upstream"]) if _is_text(target.get("upstream")) else None
            if served is not None and _is_text(block.get("name")):
                found.setdefault(block["name"], str(served.get("protocol", "")))
    for upstream in upstreams.values():
        for model in _texts(upstream.get("models")):
            found.setdefault(model, str(upstream.get("protocol", "")))
    return found


def _items(table: dict[str, Any], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the tables of a list, with their place in it; what is none is told by the reader."""
    items = table.get(key)
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict):
            yield index, item


def _texts(items: Any) -> list[str]:
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)
