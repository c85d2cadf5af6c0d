"""Both clients against a scripted gateway: instances, what is repeated, what is raised."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import gpuproxy
from gpuproxy import client as errors
from gpuproxy.client.happening import socket_url

OFFERS = {"data": [{"id": "vast-1", "price_per_hour": 0.3}, {"id": "vast-2", "price_per_hour": 0.2}], "count": 2}
Script = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


class Scripted:
    """A gateway that answers by its script, and remembers what it was asked; and a client of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str, Any]] = []
        self.waits: list[float] = []
        self.script: Script
        self.client: gpuproxy.AsyncClient

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path_qs, request.headers.get("Idempotency-Key", ""), body))
        return await self.script(request, len(self.asked))

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    gateway, app = Scripted(), web.Application()
    app.router.add_route("*", "/{path:.*}", gateway.serve)
    async with TestServer(app) as server:
        url = f"{str(server.make_url('')).rstrip('/')}/api/v1"
        async with gpuproxy.AsyncClient(url, "gp_key", sleep=gateway.sleep) as gateway.client:
            yield gateway


def refusal(status: int, code: str, **headers: str) -> web.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.json_response({"error": "no", "code": code}, status=status, headers=named)


async def test_gpus_are_a_list_that_also_answers_its_count(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return web.json_response(OFFERS)

    scripted.script = script
    gpus = await scripted.client.list_gpus(provider="vast.ai", min_vram=16, spot=True, region=None)
    assert (gpus["count"], len(gpus), sorted(gpus, key=lambda x: x["price_per_hour"])[0]["id"]) == (2, 2, "vast-2")
    assert scripted.asked[0][1] == "/api/v1/gpu/instances?provider=vast.ai&min_vram=16&spot=true"


async def test_an_instance_is_waited_for_until_it_runs(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        status = "pending" if count < 3 else "running"
        told = {"contract_id": "c1", "status": status} | ({"ip": "1.2.3.4"} if status == "running" else {})
        answer = {**told, "data": told, "status": "success"}  # as the gateway tells of one thing
        return web.json_response(answer, status=201 if request.method == "POST" else 200)

    scripted.script = script
    instance = await scripted.client.create_instance("vast.ai", "vast-2", {"image": "x"})
    assert (instance["ip"], instance["contract_id"], len(scripted.waits)) == ("1.2.3.4", "c1", 2)
    assert scripted.asked[0][:2] == ("POST", "/api/v1/gpu/instances/vast.ai/vast-2")
    assert scripted.asked[1][:2] == ("GET", "/api/v1/gpu/rentals/c1")
    assert scripted.asked[0][2]
    await scripted.client.destroy_instance("vast.ai", "c1")
    assert scripted.asked[-1][:2] == ("DELETE", "/api/v1/gpu/instances/vast.ai/c1")


async def test_an_instance_that_fails_is_named(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return web.json_response({"contract_id": "c1", "status": "failed", "reason": "outbid"})

    scripted.script = script
    with pytest.raises(errors.InstanceFailedError, match="c1 is failed: outbid") as caught:
        await scripted.client.create_instance("vast.ai", "vast-2")
    assert caught.value.contract_id == "c1"


async def test_a_refusal_before_anything_happened_is_repeated_after_the_wait_asked_for(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return refusal(429, "RATE_LIMITED", Retry_After="7") if count == 1 else web.json_response({"x": 1})

    scripted.script = script
    assert await scripted.client.proxy_request("https", "https://x.example", body={}) == {"x": 1}
    assert 7 <= scripted.waits[0] < 8


async def test_what_may_have_happened_is_repeated_only_if_it_cannot_happen_twice(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return refusal(500, "INTERNAL")

    scripted.script = script
    for path, count in (("/webhooks", 3), ("/webhooks/x/test", 1), ("/gpu/proxy", 1)):
        scripted.asked.clear()
        with pytest.raises(errors.GatewayFaultError):
            await scripted.client.post(path, {})
        assert len(scripted.asked) == count
        assert len({key for _, _, key, _ in scripted.asked}) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "UNAUTHORIZED", errors.AuthenticationError),
        (402, "INSUFFICIENT_CREDITS", errors.InsufficientCreditsError),
        (403, "FORBIDDEN", errors.PermissionDeniedError), (404, "NOT_FOUND", errors.NotFoundError),
        (409, "CONFLICT", errors.ConflictError), (422, "UNPROCESSABLE", errors.InvalidRequestError),
        (502, "UPSTREAM_UNREACHABLE", errors.UpstreamError),
    ],
)  # fmt: skip
async def test_each_kind_of_failure_has_its_type(scripted: Scripted, status: int, code: str, kind: type) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return refusal(status, code)

    scripted.script = script
    with pytest.raises(kind) as caught:
        await scripted.client.get("/x")
    assert (caught.value.code, caught.value.status, len(scripted.asked)) == (code, status, 1)


async def test_who_is_asked_to_wait_too_long_is_told_so(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return refusal(503, "UNAVAILABLE", Retry_After="3600")

    scripted.script = script
    with pytest.raises(errors.UnavailableError) as caught:
        await scripted.client.get("/x")
    assert (caught.value.retry_after_s, scripted.waits) == (3600, [])


async def test_a_stream_arrives_as_it_was_sent(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.Response:
        return web.Response(body=b"data: 1\n\n", content_type="text/event-stream")

    scripted.script = script
    stream = await scripted.client.proxy_request("openinference", "http://x.example", body={}, stream=True)
    assert b"".join([piece async for piece in stream]) == b"data: 1\n\n"


async def test_events_are_resumed_after_a_break_and_none_comes_twice(scripted: Scripted) -> None:
    subscribed: list[str] = []

    async def script(request: web.Request, count: int) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        subscribed.append((await socket.receive_json())["last_event_id"])
        await socket.send_json({"type": "subscribed", "payload": {}})
        for n in (count, count + 1):
            await socket.send_json({"type": "payment_completed", "payload": {"n": n}, "id": f"evt_{n}"})
        await socket.close()
        return socket

    scripted.script = script
    happening = scripted.client.events(["billing_events"])
    heard = [(await anext(happening))["payload"]["n"] for _ in range(4)]
    await happening.aclose()
    assert (heard, subscribed[:3]) == ([1, 2, 3, 4], ["", "evt_2", "evt_3"])


async def test_code_without_an_event_loop_hears_events_too(scripted: Scripted) -> None:
    left = asyncio.Event()

    async def script(request: web.Request, count: int) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive_json()
        for n in range(2):
            await socket.send_json({"type": "payment_completed", "payload": {"n": n}, "id": f"evt_{n}"})
        async for _ in socket:
            pass
        left.set()
        return socket

    def listen() -> list[int]:
        with gpuproxy.Client(scripted.client.api_url, "gp_key") as client:
            happening = client.events(["billing_events"])
            heard = [next(happening)["payload"]["n"] for _ in range(2)]
            happening.close()
            return heard

    scripted.script = script
    assert await asyncio.to_thread(listen) == [0, 1]
    async with asyncio.timeout(20):
        await left.wait()


async def test_events_go_on_from_where_they_began_though_none_had_come(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    subscribed: list[str] = []
    last = {"type": "subscribed", "payload": {"last_event_id": "evt_5"}}
    away, lost = ({"type": "error", "payload": {"code": code, "error": code}} for code in ("UNAVAILABLE", "NOT_FOUND"))
    event = {"type": "payment_completed", "payload": {}, "id": "evt_8"}
    told = iter(([last], [last, away, event | {"id": "evt_7"}], [last, lost, event]))

    async def script(request: web.Request, count: int) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        subscribed.append((await socket.receive_json())["last_event_id"])
        for each in next(told):
            await socket.send_json(each)
        await socket.close()
        return socket

    scripted.script = script
    happening = scripted.client.events(["billing_events"])
    assert (await anext(happening))["id"] == "evt_8"
    await happening.aclose()
    assert (subscribed, len(scripted.waits)) == (["", "evt_5", "evt_5"], 2)
    assert "events may have been missed: NOT_FOUND" in caplog.text


async def test_a_channel_that_is_refused_is_raised(scripted: Scripted) -> None:
    async def script(request: web.Request, count: int) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"type": "error", "payload": {"code": "UNAUTHORIZED", "error": "private"}})
        await socket.receive()
        return socket

    scripted.script = script
    with pytest.raises(errors.AuthenticationError, match="private"):
        await anext(scripted.client.events(["billing_events"]))


@pytest.mark.parametrize(("status", "asked"), [(200, 1), (404, 1), (405, 1), (429, 3), (501, 3), (503, 3)])
async def test_what_is_no_gateway_is_raised_and_not_asked_for_ever(scripted: Scripted, status: int, asked: int) -> None:
    async def script(request: web.Request, count: int) -> web.StreamResponse:
        return web.Response(status=status)

    scripted.script = script
    with pytest.raises(errors.GpuproxyError, match=f"/ws answered {status}"):
        await anext(scripted.client.events(["billing_events"]))
    assert len(scripted.asked) == asked


async def test_a_gateway_that_was_never_reached_is_raised(scripted: Scripted) -> None:
    async with gpuproxy.AsyncClient("http://127.0.0.1:1/api/v1", "gp_key", sleep=scripted.sleep) as client:
        with pytest.raises(errors.ConnectionFailedError):
            await anext(client.events(["billing_events"]))
    assert len(scripted.waits) == 2


def test_the_socket_is_beside_the_api() -> None:
    assert socket_url("https://gw.example/api/v1") == "wss://gw.example/ws"
    assert socket_url("http://gw.example/base/api/v1/") == "ws://gw.example/base/ws"
