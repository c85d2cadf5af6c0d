"""vast.ai: what each of its odd answers means, and what is sent to it."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from gpuproxy_plugins.vast import SPACING_S, Vast
from gpuproxy_plugins.vast_wire import InstanceRow, read_instance
from msgspec import structs
from provider_worlds import VAST_KEY, VastWorld, check_faults, failure
from simulators.vast import THRESHOLDS_S

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

SPEC = InstanceSpec(image="vllm/vllm-openai:latest", ports=(8000,), env={"MODEL": "m"}, command=("--model", "m"))


@pytest.fixture
async def world() -> AsyncIterator[VastWorld]:
    """Bring up a simulated vast.ai and an adapter for it."""
    made = VastWorld()
    await made.start()
    yield made
    await made.close()


CALLS: dict[str, Callable[[Vast, str, str], Awaitable[object]]] = {
    "search": lambda vast, offer, id: vast.offers(OfferQuery()),
    "gpu_names": lambda vast, offer, id: vast.offers(OfferQuery(gpu_model="H100")),
    "create": lambda vast, offer, id: vast.create(offer, SPEC, "gp-2"),
    "list": lambda vast, offer, id: vast.list(),
    "show": lambda vast, offer, id: vast.get(id),
    "change": lambda vast, offer, id: vast.stop(id),
    "destroy": lambda vast, offer, id: vast.destroy(id),
    "logs": lambda vast, offer, id: vast.logs(id, 5),
    "charges": lambda vast, offer, id: vast.charges(0, 10**18),
    "user": lambda vast, offer, id: vast.check(),
}
CHANGING = ("create", "change", "destroy")


@pytest.mark.parametrize("operation", CALLS)
async def test_a_fault_is_told_for_what_it_is(operation: str) -> None:
    faults = {
        "auth_401": Unauthorized,
        "auth_403": Unauthorized,
        "auth_404": Unauthorized,
        "scope_403": Unauthorized,
        "429_text": RateLimited,
        "429_json": RateLimited,
        "429_detail": RateLimited,
        "html_502": ProviderUnavailable,
        "html_504": ProviderUnavailable,
        "500_json": ProviderUnavailable,
        "html_404": InvalidAnswer,
        "html_200": InvalidAnswer,
        "drop_before": ProviderUnavailable,
        "drop_after": ProviderUnavailable,
    }
    await check_faults(VastWorld, operation, CALLS[operation], operation in CHANGING, faults)


@pytest.mark.parametrize(
    ("operation", "kind", "expected"),
    [
        ("create", "no_credit", InsufficientFunds),
        ("create", "invalid_args", SpecRefused),
        ("create", "gone_410", CapacityGone),
        ("create", "no_success", SpecRefused),
        ("create", "garbage", InvalidAnswer),
        ("search", "garbage", InvalidAnswer),
        ("list", "garbage", InvalidAnswer),
        ("list", "list_for_object", InvalidAnswer),
        ("list", "deprecated", InvalidAnswer),
        ("list", "no_row", InvalidAnswer),
        ("list", "no_success", InvalidAnswer),
        ("list", "empty", InvalidAnswer),
        ("show", "list_for_object", InvalidAnswer),
        ("show", "no_row", InvalidAnswer),
        ("show", "other_row", InvalidAnswer),
        ("show", "bad_row", InvalidAnswer),
        ("destroy", "no_success", InvalidAnswer),
        ("search", "quota", RateLimited),
    ],
)
async def test_an_answer_that_is_no_success_is_never_taken_for_one(
    world: VastWorld, operation: str, kind: str, expected: type[ProviderError]
) -> None:
    assert type(await failure(world, operation, kind, CALLS[operation])) is expected


async def test_a_page_in_the_place_of_an_answer_is_not_shown(world: VastWorld) -> None:
    assert "a web page" in str(await failure(world, "list", "html_502", CALLS["list"]))


@pytest.mark.parametrize(("kind", "seconds"), [("429_text", 4.5), ("429_detail", 4.5), ("429_retry_after", 12)])
async def test_a_limit_says_when_to_come_back(world: VastWorld, kind: str, seconds: float) -> None:
    error = await failure(world, "list", kind, CALLS["list"])
    assert error.retry_after_s == seconds


@pytest.mark.parametrize(
    ("operation", "kind"),
    [("search", "search"), ("create", "create"), ("list", "list"), ("show", "one"), ("change", "state"),
     ("destroy", "destroy"), ("charges", "other")],
)  # fmt: skip
def test_calls_keep_more_than_the_least_distance_for_they_are_not_all_as_long_on_their_way(
    operation: str, kind: str
) -> None:
    assert SPACING_S[kind] > 1.09 * THRESHOLDS_S[operation]


async def test_a_call_after_a_limit_waits_or_is_refused_without_being_sent(world: VastWorld) -> None:
    await failure(world, "search", "quota", CALLS["search"])
    before = world.simulator.faults.count("search")
    with pytest.raises(RateLimited) as raised:
        await world.adapter.offers(OfferQuery())
    assert world.simulator.faults.count("search") == before
    midnight_s = (world.clock.now_s // 86_400 + 1) * 86_400
    assert raised.value.retry_after_s == pytest.approx(midnight_s - world.clock.now_s, abs=5)
    assert raised.value.may_have_worked is False
    assert await world.adapter.list()  # other calls go on


@pytest.mark.parametrize("kind", ["drop_after", "hang_after", "html_after", "double"])
async def test_a_create_whose_answer_is_lost_is_found_by_its_tag(world: VastWorld, kind: str) -> None:
    url = str(world.simulator.server.make_url("")).rstrip("/")
    hasty = Vast(ProviderSettings(api_key=VAST_KEY, base_url=url, spacing_s=0.0, timeout_s=0.4), world.clock)
    (offer,) = await world.adapter.offers(OfferQuery(limit=1))
    world.simulator.faults.add("create", kind)
    if kind == "double":
        with pytest.raises(CapacityGone):  # the second of the two is what the answer tells of
            await hasty.create(offer.id, SPEC, "gp-7")
    else:
        with pytest.raises(ProviderUnavailable) as raised:
            await hasty.create(offer.id, SPEC, "gp-7")
        assert raised.value.may_have_worked
    assert world.simulator.faults.count("create") == 1
    assert [seen.tag for seen in await world.adapter.find("gp-7")] == ["gp-7"]
    await hasty.close()


@pytest.mark.parametrize("is_dearer", [False, True])
async def test_without_searches_for_the_day_an_offer_is_rented_and_left_if_it_is_dearer(
    world: VastWorld, is_dearer: bool
) -> None:
    (offer,) = await world.adapter.offers(OfferQuery(limit=1))
    world.simulator.faults.add("search", "quota")
    spec = InstanceSpec(image="a/b", disk_gb=10, max_price_nanousd_per_hour=offer.price_nanousd_per_hour)
    if not is_dearer:
        made = await world.adapter.create(offer.id, spec, "gp-1")
        assert made.price_nanousd_per_hour == offer.price_nanousd_per_hour
        return
    world.simulator.market.asks[int(offer.id)]["dph_base"] *= 1.01
    with pytest.raises(CapacityGone, match="dearer") as raised:
        await world.adapter.create(offer.id, spec, "gp-1")
    assert [each.id for each in await world.adapter.find("gp-1")] == [raised.value.instance_id]


async def test_a_tag_that_was_doubled_finds_both(world: VastWorld) -> None:
    first, second = await world.rented("gp-1"), await world.rented("gp-1")
    assert sorted(seen.id for seen in await world.adapter.find("gp-1")) == sorted([first.id, second.id])


async def test_a_create_that_did_nothing_is_seen_to_have_done_nothing(world: VastWorld) -> None:
    world.simulator.faults.add("create", "lose")
    made = await world.rented()
    assert await world.adapter.get(made.id) is None
    assert await world.adapter.find("gp-1") == []


async def test_a_destroy_that_did_nothing_leaves_the_instance_to_be_seen(world: VastWorld) -> None:
    made = await world.rented()
    world.simulator.faults.add("destroy", "lose")
    await world.adapter.destroy(made.id)
    assert await world.adapter.get(made.id) is not None


async def test_more_instances_than_a_page_holds_are_all_listed(world: VastWorld) -> None:
    market = world.simulator.market
    for ask in market.open_asks()[:55]:
        market.create(ask, {"image": "a/b", "label": "x"})
    before = world.simulator.faults.count("list")
    assert {seen.id for seen in await world.adapter.list()} == {str(id) for id in market.lives}
    assert world.simulator.faults.count("list") == before + 3


async def test_what_is_sent_to_rent_is_what_the_vendor_asks_for(world: VastWorld) -> None:
    made = await world.rented("gp-1", env={"MODEL": "m"}, command=("--model", "m"), ports=(8000, 9000), disk_gb=40)
    asked = world.simulator.faults.asked[-1]
    assert (asked.method, asked.operation) == ("PUT", "create")
    assert asked.headers["authorization"] == f"Bearer {VAST_KEY}"
    assert VAST_KEY not in str(asked.query)
    assert asked.body == {
        "client_id": "me",
        "image": "vllm/vllm-openai:latest",
        "disk": 40.0,
        "env": {"MODEL": "m", "-p 8000:8000": "1", "-p 9000:9000": "1"},
        "label": "gp-1",
        "target_state": "running",
        "cancel_unavail": True,
        "runtype": "args",
        "args": ["--model", "m"],
    }
    assert made.tag == "gp-1"


async def test_a_line_for_a_shell_takes_the_place_of_the_entrypoint(world: VastWorld) -> None:
    await world.rented("gp-1", command=("sh", "-c", "cd /m && exec serve"))
    body = world.simulator.faults.asked[-1].body
    assert (body["runtype"], body["onstart"], body["args"]) == ("args", "/bin/sh", ["-c", "cd /m && exec serve"])


async def test_an_ssh_key_is_let_in_before_the_command_runs(world: VastWorld) -> None:
    made = await world.running(ssh_key="ssh-ed25519 AAAA it's me", command=("python3", "a b.py"))
    body = world.simulator.market.lives[int(made.id)].body
    assert body["runtype"] == "ssh_direc ssh_proxy"
    assert body["onstart"].splitlines() == [
        """mkdir -p /root/.ssh && echo 'ssh-ed25519 AAAA it'"'"'s me' >> /root/.ssh/authorized_keys""",
        "python3 'a b.py'",
    ]
    assert set(made.ports) == {8000, 22}


async def test_a_bid_is_sent_in_dollars_and_outbid_it_stops(world: VastWorld) -> None:
    (offer,) = await world.adapter.offers(OfferQuery(is_spot=True, limit=1))
    bid = offer.price_nanousd_per_hour + 10_000_000
    made = await world.adapter.create(offer.id, InstanceSpec(image="a/b", bid_nanousd_per_hour=bid), "gp-1")
    life = world.simulator.market.lives[int(made.id)]
    assert round(life.body["price"] * 1e9) == bid - 10 * offer.storage_nanousd_per_gb_hour
    assert bid == made.price_nanousd_per_hour
    assert (await world.seen(made)).price_nanousd_per_hour == pytest.approx(bid, abs=10), "the disk is in it"
    world.clock.now_s += world.boot_s
    world.simulator.market.outbid(life.ask["machine_id"], 30.0)
    world.clock.now_s += world.boot_s
    seen = await world.seen(made)
    assert (seen.state, seen.is_interrupted, seen.ports) == ("stopped", True, {})


async def test_a_bid_of_the_listed_price_wins_however_it_was_rounded_and_pays_for_the_disk(world: VastWorld) -> None:
    for ask in world.simulator.market.asks.values():
        ask["min_bid"] = round(ask["min_bid"], 4) + 1e-10
    (offer,) = await world.adapter.offers(OfferQuery(is_spot=True, limit=1))
    bid = offer.price_nanousd_per_hour + 90 * offer.storage_nanousd_per_gb_hour
    spec = InstanceSpec(image="a/b", disk_gb=100, bid_nanousd_per_hour=bid)
    made = await world.adapter.create(offer.id, spec, "gp-1")
    seen = await world.seen(made)
    assert (seen.state, made.price_nanousd_per_hour) == ("pending", bid)
    assert seen.price_nanousd_per_hour == pytest.approx(bid, abs=100)
    with pytest.raises(CapacityGone, match="does not pay for the disk"):
        await world.adapter.create(offer.id, structs.replace(spec, bid_nanousd_per_hour=1), "gp-2")


async def test_a_bid_too_low_names_the_stopped_instance_it_left_behind(world: VastWorld) -> None:
    (offer,) = await world.adapter.offers(OfferQuery(is_spot=True, limit=1))
    low = InstanceSpec(image="a/b", bid_nanousd_per_hour=offer.price_nanousd_per_hour // 2)
    with pytest.raises(CapacityGone) as raised:
        await world.adapter.create(offer.id, low, "gp-1")
    (left,) = await world.adapter.find("gp-1")
    assert (left.id, left.state) == (raised.value.instance_id, "stopped")
    await world.adapter.destroy(left.id)
    assert await world.adapter.list() == []


async def test_a_container_that_cannot_start_has_failed(world: VastWorld) -> None:
    made = await world.rented()
    world.simulator.market.lives[int(made.id)].is_broken = True
    world.clock.now_s += world.boot_s
    seen = await world.seen(made)
    assert (seen.state, seen.ports) == ("failed", {})
    assert "OCI runtime create failed" in seen.message


@pytest.mark.parametrize("status", ["unknown", "offline", "a new word"])
def test_what_is_not_known_to_run_is_out_of_sight(status: str) -> None:
    row = InstanceRow(1, actual_status=status, cur_state="running", next_state="running", intended_status="running")
    seen = read_instance(row)
    assert (seen.state, seen.is_reachable) == ("running", False)
    row.actual_status = "running"
    assert read_instance(row).is_reachable


async def test_rows_that_do_not_fit_the_query_are_dropped(world: VastWorld) -> None:
    world.simulator.faults.add("search_rows", "violate")
    offers = await world.adapter.offers(OfferQuery(gpu_model="RTX 4090", min_vram_gb=24))
    assert offers
    assert {offer.gpu_model for offer in offers} == {"RTX 4090"}


async def test_a_model_is_asked_for_in_the_vendors_spelling(world: VastWorld) -> None:
    await world.adapter.offers(OfferQuery(gpu_model="h100"))
    await world.adapter.offers(OfferQuery(gpu_model="a100"))
    assert world.simulator.faults.asked[-1].body["gpu_name"] == {"in": ["A100 SXM4"]}
    assert world.simulator.faults.count("gpu_names") == 1  # the catalogue is kept for an hour


async def test_a_card_is_known_by_the_size_it_is_sold_as(world: VastWorld) -> None:
    offers = await world.adapter.offers(OfferQuery(limit=1_000))
    sizes = {offer.gpu_model: offer.vram_gb for offer in offers}
    assert sizes["RTX 4090"] == 24
    assert sizes["L40S"] == 48
    assert sizes["H100 SXM"] == 80
    assert sizes["H200"] == 141


async def test_a_log_is_fetched_without_the_credential(world: VastWorld) -> None:
    made = await world.running()
    await world.adapter.logs(made.id, 3)
    fetched = [asked for asked in world.simulator.faults.asked if asked.operation == "log_file"]
    assert len(fetched) == 2  # it was not there at once
    assert all("authorization" not in asked.headers for asked in fetched)


@pytest.mark.parametrize("id", ["../users/current", "12x", "", "٣", "-1", "1" * 30])
async def test_what_is_no_id_of_theirs_is_never_sent(world: VastWorld, id: str) -> None:
    assert await world.adapter.get(id) is None
    await world.adapter.destroy(id)
    with pytest.raises(InstanceGone):
        await world.adapter.stop(id)
    with pytest.raises(CapacityGone):
        await world.adapter.create(id, SPEC, "gp-1")
    assert world.simulator.faults.asked == []


async def test_an_account_without_credit_does_not_pass_the_check(world: VastWorld) -> None:
    world.simulator.market.credit = 0.0
    with pytest.raises(InsufficientFunds, match="add credit"):
        await world.adapter.check()


async def test_without_a_credential_the_check_says_where_to_put_it(world: VastWorld) -> None:
    url = str(world.simulator.server.make_url("")).rstrip("/")
    bare = Vast(ProviderSettings(base_url=url, spacing_s=0.0))
    with pytest.raises(Unauthorized, match="api_key_env"):
        await bare.check()
    with pytest.raises(Unauthorized):
        await bare.list()
    assert await bare.offers(OfferQuery())  # which needs none
    await bare.close()


async def test_a_wrong_credential_never_means_that_an_instance_is_gone(world: VastWorld) -> None:
    made = await world.rented()
    url = str(world.simulator.server.make_url("")).rstrip("/")
    wrong = Vast(ProviderSettings(api_key="other", base_url=url, spacing_s=0.0))
    for call in (wrong.get(made.id), wrong.list(), wrong.destroy(made.id)):
        with pytest.raises(Unauthorized):
            await call
    await wrong.close()


def test_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"knows none; take out region"):
        Vast(ProviderSettings(options={"region": "x"}))
