"""Upstreams and models set while running: laid over the file's, checked as a whole, audited."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from gpuproxy.config import Config, build
from gpuproxy.control.parts import ROUTING
from gpuproxy.control.routing import Block, RoutingFeed
from gpuproxy.link.messages import EndpointState
from gpuproxy.store.schema import audit, routing_blocks

from .conftest import Api, Person

UPSTREAMS, MODELS = "/api/v1/admin/upstreams", "/api/v1/admin/models"
FILE = {"name": "file", "protocol": "openinference", "urls": ["http://file"], "models": ["m"]}
MADE = {"name": "made", "protocol": "openinference", "urls": ["http://made"], "headers": {"X-Secret": "hunter2"}}


@pytest.fixture
async def settings() -> Config:
    return build({"upstreams": [FILE]})


@pytest.fixture
async def ask(api: Api) -> Callable[..., Any]:
    """Return a function that calls as an admin and expects a status."""
    admin = await api.person(is_admin=True)

    async def call(status: int, method: str, path: str, body: Any = None) -> Any:
        got, told = await api.call(method, path, body, admin.by_token)
        assert got == status, told
        return told

    call.admin = admin  # type: ignore[attr-defined]
    return call


async def test_an_upstream_is_added_replaced_and_deleted(ask: Callable[..., Any], api: Api) -> None:
    made = await ask(201, "POST", UPSTREAMS, MADE)
    assert (made["id"], made["source"], made["block"]["urls"]) == ("made", "api", ["http://made"])
    listed = await ask(200, "GET", UPSTREAMS)
    assert [(each["id"], each["source"]) for each in listed["data"]] == [("file", "file"), ("made", "api")]
    await ask(200, "PUT", f"{UPSTREAMS}/made", {**MADE, "urls": ["http://other"]})
    listed = await ask(200, "GET", UPSTREAMS)
    assert listed["data"][1]["block"]["urls"] == ["http://other"]
    assert "hunter2" not in repr(listed)
    await ask(200, "PUT", f"{UPSTREAMS}/made", listed["data"][1]["block"])
    (made,) = [each for each in api.client.app[ROUTING].config.upstreams if each.name == "made"]
    assert made.headers == MADE["headers"], "what is not shown can be sent back"
    assert (await ask(200, "DELETE", f"{UPSTREAMS}/made"))["source"] == ""
    assert (await ask(200, "GET", UPSTREAMS))["count"] == 1
    async with api.store.reading() as connection:
        rows = (await connection.execute(select(audit.c.actor_user_id, audit.c.action, audit.c.detail))).all()
    admin: Person = ask.admin  # type: ignore[attr-defined]
    assert [(row.actor_user_id, row.action) for row in rows] == [
        (admin.id, "upstreams.set"),
        (admin.id, "upstreams.set"),
        (admin.id, "upstreams.set"),
        (admin.id, "upstreams.delete"),
    ]
    assert "hunter2" not in repr(rows)


async def test_one_of_the_file_is_replaced_and_comes_back(ask: Callable[..., Any]) -> None:
    await ask(409, "POST", UPSTREAMS, FILE)
    assert "stands in the configuration file" in (await ask(409, "DELETE", f"{UPSTREAMS}/file"))["error"]
    await ask(200, "PUT", f"{UPSTREAMS}/file", {**FILE, "urls": ["http://instead"]})
    assert (await ask(200, "DELETE", f"{UPSTREAMS}/file"))["source"] == "file"
    (listed,) = (await ask(200, "GET", UPSTREAMS))["data"]
    assert (listed["source"], listed["block"]["urls"]) == ("file", ["http://file"])


async def test_a_model_names_upstreams_of_file_and_api(ask: Callable[..., Any]) -> None:
    await ask(201, "POST", UPSTREAMS, MADE)
    targets = [{"upstream": "file"}, {"upstream": "made", "weight": 3, "as": "there"}]
    made = await ask(201, "POST", MODELS, {"name": "org/big", "targets": targets, "fallback": ["m"]})
    assert made["block"]["targets"][1]["as"] == "there"
    await ask(409, "POST", MODELS, {"name": "org/big", "targets": targets})
    assert 'unknown upstream "made"' in (await ask(422, "DELETE", f"{UPSTREAMS}/made"))["error"], "it is in use"
    await ask(200, "PUT", f"{MODELS}/org%2Fbig", {"name": "org/big", "targets": targets[:1]})
    await ask(200, "DELETE", f"{UPSTREAMS}/made")
    await ask(200, "DELETE", f"{MODELS}/org%2Fbig")
    assert (await ask(200, "GET", MODELS))["count"] == 0


async def test_models_in_force_are_known_by_every_name(ask: Callable[..., Any], api: Api) -> None:
    feed = api.client.app[ROUTING]
    target = {"upstream": "file", "as": "there"}
    await ask(201, "POST", MODELS, {"name": "made", "aliases": ["alias"], "targets": [target]})
    assert [name for name in ("m", "made", "alias", "there", "rubbish") if not feed.is_model(name)] == ["rubbish"]
    await ask(200, "DELETE", f"{MODELS}/made")
    assert [name for name in ("m", "made", "alias", "there") if feed.is_model(name)] == ["m"]


async def test_what_does_not_fit_is_refused_with_every_fault_and_changes_nothing(ask: Callable[..., Any]) -> None:
    told = await ask(422, "POST", UPSTREAMS, {**MADE, "urls": ["ftp://x", "http://"], "api_key_env": "sk-1"})
    for fault in ("urls[0]", "urls[1]", "api_key_env"):
        assert fault in told["error"]
    assert "no plugin speaks 'smtp'" in (await ask(422, "POST", UPSTREAMS, {**MADE, "protocol": "smtp"}))["error"]
    told = await ask(422, "POST", MODELS, {"name": "x", "targets": [{"upstream": "nope"}], "fallback": ["nobody"]})
    assert 'unknown upstream "nope"' in told["error"]
    assert 'unknown model "nobody"' in told["error"]
    await ask(422, "PUT", f"{UPSTREAMS}/another", MADE)
    await ask(404, "DELETE", f"{UPSTREAMS}/nope")
    assert (await ask(200, "GET", UPSTREAMS))["count"] == 1


class Link:
    """What a feed needs of the link's server."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def publish_routing(self, routing: Any) -> None:
        self.told.append([upstream.name for upstream in routing.upstreams])

    def states(self) -> list[EndpointState]:
        return []


async def test_a_change_of_another_node_is_pushed_once(ask: Callable[..., Any], api: Api) -> None:
    link = Link()
    feed = RoutingFeed(api.store, build({"upstreams": [FILE]}), link)  # type: ignore[arg-type]
    await feed.poll_once()
    await feed.poll_once()
    await ask(201, "POST", UPSTREAMS, MADE)
    stopping = asyncio.Event()
    running = asyncio.create_task(feed.run(stopping))
    async with asyncio.timeout(20):
        while len(link.told) < 2:
            await asyncio.sleep(0.01)
    stopping.set()
    feed.wake()
    await running
    assert link.told == [["file"], ["file", "made"]]


async def test_a_change_is_seen_though_another_nodes_clock_is_ahead(ask: Callable[..., Any], api: Api) -> None:
    for name in ("a", "b"):
        await ask(201, "POST", UPSTREAMS, {**MADE, "name": name})
    async with api.store.writing() as connection:
        await connection.execute(update(routing_blocks).values(changed_at=datetime.now(UTC) + timedelta(seconds=60)))
    feed = RoutingFeed(api.store, build({"upstreams": [FILE]}))
    await feed.poll_once()
    await ask(200, "PUT", f"{UPSTREAMS}/a", {**MADE, "name": "a", "urls": ["http://changed"]})
    await feed.poll_once()
    assert feed.config.upstreams[1].urls == ("http://changed",)


async def test_of_many_that_add_one_at_once_one_does(api: Api) -> None:
    admin = await api.person(is_admin=True)
    calls = await asyncio.gather(*(api.call("POST", UPSTREAMS, MADE, admin.by_token) for _ in range(6)))
    assert sorted(status for status, _ in calls) == [201, *[409] * 5]


async def test_blocks_that_fit_no_more_are_left_out_and_the_others_stay(ask: Callable[..., Any], api: Api) -> None:
    await ask(201, "POST", UPSTREAMS, MADE)
    await ask(201, "POST", MODELS, {"name": "x", "targets": [{"upstream": "file"}]})
    await ask(201, "POST", MODELS, {"name": "y", "targets": [{"upstream": "made"}]})
    await ask(201, "POST", MODELS, {"name": "z", "targets": [{"upstream": "made"}], "fallback": ["x"]})
    link = Link()
    feed = RoutingFeed(api.store, build({"upstreams": [{**FILE, "name": "renamed"}]}), link)  # type: ignore[arg-type]
    await feed.poll_once()
    assert link.told == [["renamed", "made"]]
    assert [model.name for model in feed.config.models] == ["y"], "z falls back to what is not there"
    assert feed.set_names == {("upstreams", "made"), ("models", "y")}


async def test_what_fits_no_more_hinders_no_change_and_can_be_deleted(ask: Callable[..., Any], api: Api) -> None:
    lost = {"upstream": "lost"}
    await ask(201, "POST", UPSTREAMS, {**MADE, "name": "lost"})
    await ask(201, "POST", MODELS, {"name": "y", "targets": [lost]})
    await ask(201, "POST", MODELS, {"name": "z", "targets": [lost]})
    async with api.store.writing() as connection:  # as one of the file that was taken out there
        await connection.execute(delete(routing_blocks).where(routing_blocks.c.name == "lost"))
    await ask(201, "POST", UPSTREAMS, MADE)
    assert (
        'models["y"].targets[0].upstream: unknown'
        in (await ask(422, "PUT", f"{MODELS}/y", {"name": "y", "targets": [lost, {"upstream": "made"}]}))["error"]
    )
    await ask(200, "PUT", f"{MODELS}/y", {"name": "y", "targets": [{"upstream": "made"}]})
    assert 'models["y"]' in (await ask(422, "DELETE", f"{UPSTREAMS}/made"))["error"], "it is in use"
    await ask(200, "DELETE", f"{MODELS}/z")
    assert [each["id"] for each in (await ask(200, "GET", MODELS))["data"]] == ["y"]


async def test_blocks_whose_fault_is_elsewhere_leave_the_file_in_force(ask: Callable[..., Any], api: Api) -> None:
    await ask(201, "POST", MODELS, {"name": "x", "targets": [{"upstream": "file"}]})
    named = {"name": "own", "aliases": ["x"], "targets": [{"upstream": "file"}]}
    feed = RoutingFeed(api.store, build({"upstreams": [FILE], "models": [named]}))
    await feed.poll_once()
    assert [model.name for model in feed.config.models] == ["own"]
    assert feed.set_names == set()


async def test_only_what_clashes_with_a_changed_file_is_left_out(ask: Callable[..., Any], api: Api) -> None:
    target = {"upstream": "file"}
    await ask(201, "POST", UPSTREAMS, {**MADE, "models": ["short"]})
    await ask(201, "POST", UPSTREAMS, {**MADE, "name": "other"})
    await ask(201, "POST", MODELS, {"name": "x", "targets": [target]})
    await ask(201, "POST", MODELS, {"name": "y", "targets": [target]})
    for aliases, left in ((["x"], {"made", "other", "y"}), (["short"], {"other", "x", "y"})):
        named = {"name": "own", "aliases": aliases, "targets": [target]}
        feed = RoutingFeed(api.store, build({"upstreams": [FILE], "models": [named]}))
        await feed.poll_once()
        assert {name for _, name in feed.set_names} == left
    await ask(200, "PUT", f"{UPSTREAMS}/file", {**FILE, "protocol": "https", "models": []})
    beside = {"name": "beside", "protocol": "openinference", "urls": ["http://beside"]}
    both = {"name": "own", "targets": [{"upstream": "beside"}, target]}
    feed = RoutingFeed(api.store, build({"upstreams": [FILE, beside], "models": [both]}))
    await feed.poll_once()
    assert {name for _, name in feed.set_names} == {"made", "other", "x", "y"}, "what replaces the file's is the cause"


async def test_blocks_are_bounded(api: Api) -> None:
    feed = RoutingFeed(api.store, build({"upstreams": [FILE]}))
    many = [
        Block("upstreams", f"u{number}", {**MADE, "name": f"u{number}", "headers": {"X-A": "a" * 1000}})
        for number in range(1_000)
    ]
    with pytest.raises(Exception, match="bytes in all; take some out"):
        feed.merged(many)
