"""The inference server behind every gateway here, and a gateway for tests that leave it as it was."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from callers import Caller
from gateways import Gateway, Origin, Place, make_origin, running
from inference import Inference

MakePlace = Callable[..., Place]
MakeCaller = Callable[[Gateway], Caller]


@pytest.fixture(scope="session")
def inference() -> Iterator[Inference]:
    server = Inference()
    with server.thread:
        yield server


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory, inference: Inference) -> Origin:
    return asyncio.run(make_origin(tmp_path_factory.mktemp("origin"), inference.thread.port))


@pytest.fixture
def place(tmp_path: Path, origin: Origin) -> MakePlace:
    """Return a function that makes a place; its words are tables of the configuration."""

    def make(**settings: Any) -> Place:
        return Place(tmp_path, origin, **settings)

    return make


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[Gateway]:
    with running(Place(tmp_path_factory.mktemp("gateway"), origin)) as gateway:
        yield gateway


@pytest.fixture
async def new_caller() -> AsyncIterator[MakeCaller]:
    """Return a function that makes callers of a gateway; their connections are closed at the end."""
    made: list[Caller] = []

    def make(gateway: Gateway) -> Caller:
        made.append(Caller(gateway.port, gateway.place.key))
        return made[-1]

    yield make
    for caller in made:
        await caller.close()


@pytest.fixture
def caller_of_each(new_caller: MakeCaller) -> Callable[[Gateway], Awaitable[list[Caller]]]:
    """Return a function that connects to every worker; the kernel spreads connections by their port."""

    async def connect(gateway: Gateway) -> list[Caller]:
        count = len(gateway.workers())
        found: dict[str, Caller] = {}
        for _ in range(200):
            caller = new_caller(gateway)
            await caller.post()
            found.setdefault(caller.worker, caller)
            if len(found) == count:
                return list(found.values())
        raise AssertionError(f"200 connections reached only {len(found)} of {count} workers")

    return connect
