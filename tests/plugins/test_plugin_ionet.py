"""io.net: what its answers mean, what is sent to it, what is paid in advance."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from gpuproxy_plugins.ionet import IoNet
from gpuproxy_plugins.ionet_wire import read_time_ns
from provider_worlds import HOUR_S, IONET_KEY, IoNetWorld, check_faults, failure

from gpuproxy.plugin import (
    CapacityGone,
    InstanceGone,
    InstanceSpec,
    InsufficientFunds,
    InvalidAnswer,
    OfferQuery,
    ProviderError,
    ProviderSettings,
    ProviderUnavailable,
    RateLimited,
    SpecRefused,
    Unauthorized,
)

SPEC = InstanceSpec(image="vllm/vllm-openai:latest", ports=(8000,))


@pytest.fixture
async def world() -> AsyncIterator[IoNetWorld]:
    """Bring up a simulated io.net and an adapter for it."""
    made = IoNetWorld()
    await made.start()
    yield made
    await made.close()


CALLS: dict[str, Callable[[IoNet, str, str], Awaitable[object]]] = {
    "hardware": lambda ionet, offer, id: ionet.offers(OfferQuery()),
    "replicas": lambda ionet, offer, id: ionet.create(offer, SPEC, "gp-2"),
    "price": lambda ionet, offer, id: ionet.create(offer, SPEC, "gp-2"),
    "deploy": lambda ionet, offer, id: ionet.create(offer, SPEC, "gp-2"),
    "list": lambda ionet, offer, id: ionet.list(),
    "show": lambda ionet, offer, id: ionet.get(id),
    "containers": lambda ionet, offer, id: ionet.logs(id, 5),
    "log": lambda ionet, offer, id: ionet.logs(id, 5),
    "destroy": lambda ionet, offer, id: ionet.destroy(id),
}
CHANGING = ("deploy", "destroy")


@pytest.mark.parametrize("operation", CALLS)
async def test_a_fault_is_told_for_what_it_is(operation: str) -> None:
    faults = {
        "auth_401": Unauthorized,
        "auth_403": Unauthorized,
        "project_400": Unauthorized,
        "429": RateLimited,
        "html_502": ProviderUnavailable,
        "500_json": ProviderUnavailable,
        "drop_before": ProviderUnavailable,
        "drop_after": ProviderUnavailable,
    }
    await check_faults(IoNetWorld, operation, CALLS[operation], operation in CHANGING, faults)


@pytest.mark.parametrize(
    ("operation", "kind", "expected"),
    [
        ("deploy", "no_capacity", CapacityGone),
        ("deploy", "no_credit", InsufficientFunds),
        ("deploy", "conflict", InvalidAnswer),
        ("deploy", "html_404", InvalidAnswer),
        ("deploy", "422", SpecRefused),
        ("deploy", "html_200", InvalidAnswer),
        ("deploy", "garbage", InvalidAnswer),
        ("deploy", "no_data", InvalidAnswer),
        ("hardware", "garbage", InvalidAnswer),
        ("hardware", "no_data", InvalidAnswer),
        ("hardware", "404", InvalidAnswer),
        ("replicas", "no_data", InvalidAnswer),
        ("price", "no_data", InvalidAnswer),
        ("price", "422", InvalidAnswer),
        ("list", "garbage", InvalidAnswer),
        ("list", "list_for_object", InvalidAnswer),
        ("list", "no_data", InvalidAnswer),
        ("list", "empty", InvalidAnswer),
        ("list", "404", InvalidAnswer),
        ("show", "html_404", InvalidAnswer),
        ("show", "no_data", InvalidAnswer),
        ("show", "other_row", InvalidAnswer),
        ("show", "odd_status", InvalidAnswer),
        ("log", "404", InstanceGone),
    ],
)
async def test_an_answer_that_is_no_success_is_never_taken_for_one(
    world: IoNetWorld, operation: str, kind: str, expected: type[ProviderError]
) -> None:
    assert type(await failure(world, operation, kind, CALLS[operation])) is expected


async def test_a_place_in_the_body_is_named(world: IoNetWorld) -> None:
    error = await failure(world, "deploy", "422", CALLS["deploy"])
    assert "body.hardware_id: Input should be a valid integer" in str(error)


async def test_a_limit_says_when_to_come_back(world: IoNetWorld) -> None:
    assert (await failure(world, "list", "429_retry_after", CALLS["list"])).retry_after_s == 7


@pytest.mark.parametrize("kind", ["drop_after", "hang_after", "html_after"])
async def test_a_deploy_whose_answer_is_lost_is_found_by_its_tag(world: IoNetWorld, kind: str) -> None:
    url = str(world.simulator.server.make_url("")).rstrip("/")
    hasty = IoNet(ProviderSettings(api_key=IONET_KEY, base_url=url, spacing_s=0.0, timeout_s=0.6))
    (offer,) = await world.adapter.offers(OfferQuery(limit=1))
    world.simulator.faults.add("deploy", kind)
    with pytest.raises(ProviderUnavailable) as raised:
        await hasty.create(offer.id, SPEC, "gp-7")
    assert raised.value.may_have_worked
    assert world.simulator.faults.count("deploy") == 1
    assert [seen.tag for seen in await world.adapter.find("gp-7")] == ["gp-7"]
    await hasty.close()


async def test_a_tag_cannot_be_deployed_twice(world: IoNetWorld) -> None:
    await world.rented("gp-1")
    with pytest.raises(InvalidAnswer, match="already exists") as raised:
        await world.rented("gp-1")
    assert raised.value.may_have_worked  # the order with this tag is ours
    assert len(await world.adapter.find("gp-1")) == 1


async def test_what_is_sent_to_rent_is_what_the_schema_asks_for(world: IoNetWorld) -> None:
    await world.rented(
        "gp-1", env={"MODEL": "m", "HF_TOKEN": "t"}, command=("--model", "$X"), ports=(9000,), duration_hours=24
    )
    asked = world.simulator.faults.asked[-1]
    assert (asked.method, asked.operation) == ("POST", "deploy")
    assert asked.headers["x-api-key"] == IONET_KEY
    assert asked.body == {
        "resource_private_name": "gp-1",
        "duration_hours": 24,
        "gpus_per_container": 1,
        "hardware_id": 14,
        "location_ids": [8],
        "container_config": {
            "replica_count": 1,
            "traffic_port": 9000,
            "env_variables": {"MODEL": "m"},
            "secret_env_variables": {"HF_TOKEN": "t"},
            "args": ["--model", "$$X"],
        },
        "registry_config": {"image_url": "vllm/vllm-openai:latest", "registry_username": None, "registry_secret": None},
    }


async def test_a_line_for_a_shell_takes_the_place_of_the_entrypoint(world: IoNetWorld) -> None:
    await world.rented("gp-1", command=("sh", "-c", "exec serve --port $PORT"))
    container = world.simulator.faults.asked[-1].body["container_config"]
    assert (container["entrypoint"], container["args"]) == (["sh", "-c"], ["exec serve --port $$PORT"])


async def test_hours_are_paid_in_advance_and_end(world: IoNetWorld) -> None:
    before = world.simulator.credit
    made = await world.running(duration_hours=3)
    paid = round((before - world.simulator.credit) * 1e9)
    assert made.paid_nanousd == pytest.approx(paid, abs=2)
    assert made.price_nanousd_per_hour == pytest.approx(paid / 3, rel=1e-6)
    world.clock.now_s += 3 * HOUR_S
    seen = await world.seen(made)
    assert (seen.state, seen.message) == ("gone", "expired")
    assert await world.adapter.list() == []
    (charge,) = await world.adapter.charges(0, world.clock.now_ns())
    assert (charge.instance_id, charge.kind, charge.amount_nanousd) == (made.id, "prepaid", made.paid_nanousd)


async def test_it_is_pending_until_it_has_an_address_behind_tls(world: IoNetWorld) -> None:
    made = await world.rented()
    world.clock.now_s += 31
    seen = await world.seen(made)
    assert (seen.state, seen.ports) == ("pending", {})
    world.clock.now_s += 10
    seen = await world.seen(made)
    assert (seen.state, seen.ports, seen.is_tls) == ("running", {8000: 443}, True)
    assert seen.ip.endswith(".containers.example.io")


async def test_one_that_never_comes_up_has_failed(world: IoNetWorld) -> None:
    made = await world.rented()
    world.simulator.lives[made.id].is_broken = True
    world.clock.now_s += world.boot_s
    seen = await world.seen(made)
    assert seen.state == "failed"


async def test_while_it_is_being_ended_it_is_not_gone(world: IoNetWorld) -> None:
    made = await world.running()
    await world.adapter.destroy(made.id)
    await world.adapter.destroy(made.id)  # which io.net refuses
    seen = await world.seen(made)
    assert seen.state == "destroying"


async def test_a_destroy_that_did_nothing_leaves_the_instance_to_be_seen(world: IoNetWorld) -> None:
    made = await world.running()
    world.simulator.faults.add("destroy", "lose")
    await world.adapter.destroy(made.id)
    seen = await world.seen(made)
    assert seen.state == "running"


async def test_rows_nobody_can_rent_as_a_container_are_no_offers(world: IoNetWorld) -> None:
    offers = await world.adapter.offers(OfferQuery(limit=1_000))
    assert len(offers) == 9
    assert not {"8H100.80S.176V__FI", "cpu__1", "free__1", "sold__1"} & {offer.id for offer in offers}


async def test_ids_that_come_as_text_are_sent_back_as_text(world: IoNetWorld) -> None:
    world.simulator.has_text_ids = True
    assert len(await world.adapter.offers(OfferQuery(limit=1_000))) == 9
    made = await world.running()
    assert made.state == "running"
    body = next(each.body for each in world.simulator.faults.asked if each.operation == "deploy")
    assert (body["hardware_id"], body["location_ids"]) == ("14", ["CA"])


async def test_a_long_list_is_read_to_its_end(world: IoNetWorld) -> None:
    row, body = world.simulator.rows[0], {"resource_private_name": "x", "duration_hours": 1}
    for _ in range(250):
        world.simulator._made(row, body, "caas", 1.0)
    assert len(await world.adapter.list()) == 250
    assert world.simulator.faults.count("list") == 3


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"bid_nanousd_per_hour": 1}, "no bids"),
        ({"ssh_key": "ssh-ed25519 A"}, "no SSH"),
        ({"ports": (1, 2)}, "one port, not 2"),
        ({"duration_hours": 0}, "is not 1 to 8760"),
        ({"disk_gb": 501}, "over the 500"),
    ],
)
async def test_what_it_cannot_do_is_refused_before_it_is_asked(
    world: IoNetWorld, fields: dict[str, object], complaint: str
) -> None:
    with pytest.raises(SpecRefused, match=complaint):
        await world.rented(**fields)  # type: ignore[arg-type]
    assert world.simulator.faults.count("deploy") == 0


@pytest.mark.parametrize("id", ["../deployments", "12", "", "g" * 36])
async def test_what_is_no_id_of_theirs_is_never_sent(world: IoNetWorld, id: str) -> None:
    assert await world.adapter.get(id) is None
    await world.adapter.destroy(id)
    with pytest.raises(InstanceGone):
        await world.adapter.logs(id, 5)
    assert world.simulator.faults.asked == []


async def test_without_a_credential_the_check_says_where_to_put_it() -> None:
    with pytest.raises(Unauthorized, match="api_key_env"):
        await IoNet(ProviderSettings()).check()


@pytest.mark.parametrize("text", ["2026-09-21T14:13:20", "2026-09-21T14:13:20Z", "2026-09-21T16:13:20+02:00"])
def test_a_time_without_a_zone_is_utc(text: str) -> None:
    assert read_time_ns(text) == 1_790_000_000 * 10**9
