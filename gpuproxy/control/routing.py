"""Upstreams and models in force: those of the configuration, and over them those set while running.

Blocks set while running live in the store. Every control looks there for changes of others, lays them over its own
configuration and pushes the result to its workers, which take it without a restart. Blocks that do not fit the
configuration any more, after a change of the file, are told in the log and left out until they do.
"""

import asyncio
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.config import Config, build
from gpuproxy.config.checks import show
from gpuproxy.errors import ConfigError, GatewayError
from gpuproxy.link.messages import EndpointState, Routing
from gpuproxy.link.server import LinkServer
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import load_plugins, routing_faults
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import rounds, unless_unchanged
from gpuproxy.store.schema import routing_blocks

POLL_S = 1.0  # how late changes of other nodes may be noticed
TOPIC = "routing"
PLACE = re.compile(r"(?<![.\w])(upstreams|models)\[(\d+)\]")  # of a fault
PUSHED_BYTES_MAX = 900_000  # of all upstreams and models, as a worker is told: a frame of the link holds them

logger = get_logger(__name__)


class Block(NamedTuple):
    """A block set while running."""

    kind: str
    name: str
    block: dict[str, Any]

    @property
    def place(self) -> tuple[str, str]:
        """Return kind and name."""
        return self.kind, self.name


class RoutingFeed:
    """What is in force, and the way to the workers."""

    def __init__(self, store: Store, config: Config, link: LinkServer | None = None) -> None:
        self._store = store
        self._configured = config
        self._link = link
        self._plugins = load_plugins(config.plugins.enabled)
        self._seen: object = None
        self._woken = asyncio.Event()
        self.set_names: set[tuple[str, str]] = set()  # kind and name of the blocks in force that were set while running
        self._model_names: frozenset[str] = frozenset()
        self._use(config)

    def wake(self, _text: str = "") -> None:
        """Let `run` look at once."""
        self._woken.set()

    def is_model(self, name: str) -> bool:
        """Tell whether this is a name of a model in force: its own, an alias, or what an upstream calls it."""
        return name in self._model_names

    def configured(self, kind: str) -> set[str]:
        """Return the names of the blocks of the configuration file."""
        return {block.name for block in getattr(self._configured, kind)}

    def states(self) -> list[EndpointState]:
        """Return what all workers have told of their endpoints."""
        return self._link.states() if self._link is not None else []

    def merged(self, blocks: Iterable[Block]) -> Config:
        """Return the configuration with these blocks over it. Raises ConfigError with every fault."""
        found = build({kind: list(named.values()) for kind, named in self._laid_over(blocks).items()})
        faults = routing_faults(found, self._plugins)
        if len(msgspec.msgpack.encode(Routing(found.upstreams, found.models))) > PUSHED_BYTES_MAX:
            faults.append(f"upstreams and models are over {PUSHED_BYTES_MAX} bytes in all; take some out")
        if faults:
            raise ConfigError(faults)
        return msgspec.structs.replace(self._configured, upstreams=found.upstreams, models=found.models)

    def _laid_over(self, blocks: Iterable[Block]) -> dict[str, dict[str, dict[str, Any]]]:
        """Return all blocks by kind and name, in the order in which faults count them."""
        kinds = {kind: _plain(getattr(self._configured, kind)) for kind in ("upstreams", "models")}
        for block in blocks:
            kinds[block.kind][block.name] = block.block
        return kinds

    def fitting(self, blocks: list[Block]) -> tuple[Config, list[Block], list[str]]:
        """Return the configuration with the blocks that fit over it, these, and the faults of the others by name."""
        faults: list[str] = []
        while blocks:
            try:
                return self.merged(blocks), blocks, faults
            except ConfigError as error:
                names = {kind: list(named) for kind, named in self._laid_over(blocks).items()}
                faults += [_by_name(fault.removeprefix("config: "), names) for fault in error.faults]
                blocks = self._without(blocks, error, names)
        return self._configured, [], faults

    def _without(self, blocks: list[Block], error: ConfigError, names: Mapping[str, list[str]]) -> list[Block]:
        """Return the blocks but for those that have these faults; where the file's have them, but for those that these
        name, else for those that replace some of the file.
        """
        known = {block.place for block in blocks}
        faulty = {next((place for place in _places(fault, names) if place in known), None) for fault in error.faults}
        for suspects in (faulty, {(kind, name) for kind, name in known if name in self.configured(kind)}):
            kept = [block for block in blocks if block.place not in suspects]
            if len(kept) < len(blocks):
                return kept
        return []

    async def check(self, connection: AsyncConnection, before: list[Block], changed: tuple[str, str]) -> None:
        """Refuse the transaction if what it sets does not fit, or something no more that did `before`; what did not
        then is no hindrance. Raises GatewayError with every fault.
        """
        after = await blocks_set(connection)
        _, fit, faults = self.fitting(after)
        wanted = {changed, *(block.place for block in self.fitting(before)[1])}
        if wanted.intersection(block.place for block in after) - {block.place for block in fit}:
            raise GatewayError("UNPROCESSABLE", "; ".join(faults))

    async def poll_once(self) -> None:
        """Push what is in force, if it has changed."""
        columns = func.count(), func.max(routing_blocks.c.changed_at)
        (seen,) = map(tuple, await self._store.look(select(*columns)))
        if seen == self._seen:
            return
        async with self._store.reading() as connection:
            blocks = await blocks_set(connection)
        self._take(blocks)
        self._seen = seen

    def _take(self, blocks: list[Block]) -> None:
        config, fit, faults = self.fitting(blocks)
        if faults:
            logger.error("some of what was set while running does not fit, it is left out", faults="; ".join(faults))
        self._use(config)
        self.set_names = {block.place for block in fit}
        if self._link is not None:
            self._link.publish_routing(Routing(self.config.upstreams, self.config.models))

    def _use(self, config: Config) -> None:
        self.config = config
        self._model_names = frozenset(_model_names(config))

    async def run(self, stopping: asyncio.Event) -> None:
        """Poll until `stopping` is set, through outages of the store."""
        complain = partial(logger.error, "upstreams and models cannot be read, will go on")
        look = unless_unchanged(self._store, self.poll_once, math.inf)
        await rounds(look, POLL_S, stopping, complain, self._woken)


def _model_names(config: Config) -> Iterator[str]:
    for upstream in config.upstreams:
        yield from upstream.models
    for model in config.models:
        yield from (model.name, *model.aliases, *(target.name_there for target in model.targets))


def _places(fault: str, names: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield kind and name of each block that a fault counts."""
    for kind, index in PLACE.findall(fault):
        if int(index) < len(names[kind]):
            yield kind, names[kind][int(index)]


def _by_name(fault: str, names: Mapping[str, list[str]]) -> str:
    """Name the blocks that a fault counts: their numbers are nowhere to be seen."""

    def name(place: re.Match[str]) -> str:
        known = names[place[1]]
        return f"{place[1]}[{show(known[int(place[2])])}]" if int(place[2]) < len(known) else place[0]

    return PLACE.sub(name, fault)


async def blocks_set(connection: AsyncConnection) -> list[Block]:
    """Return the blocks set while running, whether they fit or not."""
    table = routing_blocks.c
    rows = await connection.execute(select(table.kind, table.name, table.block).order_by(table.kind, table.name))
    return [Block(*row) for row in rows]


def _plain(blocks: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return blocks by name, as they could stand in a file: without what is None there."""
    found = msgspec.json.decode(msgspec.json.encode(list(blocks)))
    return {block["name"]: written(block) for block in found}


def written(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block as it could be written: TOML has no null."""
    return {key: value for key, value in block.items() if value is not None}
