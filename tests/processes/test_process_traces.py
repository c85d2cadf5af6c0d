"""A whole gateway in somebody's trace: caller, gateway, upstream and receiver tell one story."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import MakePlace
from gateways import MODEL, START_S, Gateway, Origin, Place, process, running, until
from otlp_receiver import Receiver

TRACE_ID, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
USAGE = {"prompt_tokens": 12, "completion_tokens": 30}
ARRIVAL_S = 20.0


class Upstream:
    """An inference server that remembers the heads of its calls."""

    def __init__(self) -> None:
        self.heads: list[dict[str, str]] = []

    async def serve(self, request: web.Request) -> web.Response:
        self.heads.append({name.lower(): value for name, value in request.headers.items()})
        return web.json_response({"choices": [], "usage": USAGE})


@pytest.fixture
async def upstream() -> AsyncIterator[tuple[Upstream, int]]:
    made = Upstream()
    app = web.Application()
    app.router.add_post("/{path:.*}", made.serve)
    async with TestServer(app, host="127.0.0.1") as server:
        assert server.port is not None
        yield made, server.port


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().running() as running_receiver:
        yield running_receiver


async def ask(gateway: Gateway, query: str = "", **headers: str) -> int:
    """Make a chat call and return the status."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "canary-body"}]}
    url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions{query}"
    headers = {"Authorization": f"Bearer {gateway.place.key}", **headers}
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as answer:
        await answer.read()
        return answer.status


async def test_one_trace_from_the_caller_to_the_upstream(
    tmp_path: Path, origin: Origin, upstream: tuple[Upstream, int], receiver: Receiver
) -> None:
    server, port = upstream
    traces = {"endpoint": receiver.url, "interval_s": 0.05, "headers_env": "TRACE_HEADERS"}
    here = Place(tmp_path, origin._replace(upstream_port=port), traces=traces, log={"format": "json"})
    with running(here, environment={"TRACE_HEADERS": "x-secret=canary-header"}) as gateway:
        parent = f"00-{TRACE_ID}-{CALLER}-01"
        assert await ask(gateway, "?token=canary-query", traceparent=parent, baggage="canary=baggage") == 200
        await until(lambda: receiver.bodies, ARRIVAL_S, "spans")
        call, attempt = receiver.spans
        assert (call.trace_id, call.parent_id, attempt.parent_id) == (TRACE_ID, CALLER, call.id)
        (head,) = server.heads
        assert head["traceparent"] == f"00-{TRACE_ID}-{attempt.id}-01"
        assert head["baggage"] == "canary=baggage"
        assert (call.name, attempt.name) == ("POST /v1/chat/completions", f"chat {MODEL}")
        assert attempt.attributes["gen_ai.usage.output_tokens"] == 30
        assert attempt.attributes["server.port"] == port
        assert call.start_ns <= attempt.start_ns <= attempt.end_ns <= call.end_ns
        assert receiver.headers["x-secret"] == "canary-header"
        sent = b"".join(receiver.bodies)
        assert not [word for word in (b"canary", here.key.encode()) if word in sent]
        metrics = await _metrics(gateway)
        assert 'gpuproxy_traces_total{outcome="sent"} 1.0' in metrics
        assert await ask(gateway) == 200  # stored and sent by the last pass at the latest
        assert await asyncio.to_thread(gateway.stop) == 0
    assert len(receiver.spans) == 4
    assert here.query("SELECT trace_id FROM receipts ORDER BY started_ns")[0] == (TRACE_ID,)
    lines = [json.loads(line) for line in here.log.read_text().splitlines() if '"message":"call"' in line]
    assert lines[0]["trace_id"] == TRACE_ID
    assert "canary" not in here.log.read_text()


async def _metrics(gateway: Gateway) -> str:
    url = f"http://127.0.0.1:{gateway.port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


async def test_calls_are_served_and_stored_while_the_receiver_hangs(
    place: MakePlace, upstream: tuple[Upstream, int], receiver: Receiver
) -> None:
    traces = {"endpoint": receiver.url, "interval_s": 0.01, "timeout_s": 0.2, "queue_max": 2}
    here = place(traces=traces)
    here.upstream_url = f"http://127.0.0.1:{upstream[1]}"
    here.configure()
    receiver.gate.clear()
    with running(here) as gateway:
        for _ in range(6):
            assert await ask(gateway) == 200
        await until(lambda: len(here.receipts()) == 6, ARRIVAL_S, "receipts")
        assert 'gpuproxy_traces_total{outcome="dropped"} 4.0' in await _metrics(gateway)
        assert await asyncio.to_thread(gateway.stop) == 0
    assert receiver.bodies == []


def test_a_headers_variable_that_is_not_set_is_told(place: MakePlace) -> None:
    here = place(traces={"endpoint": "http://127.0.0.1:9/", "headers_env": "TRACE_HEADERS"})
    assert "TRACE_HEADERS is not set" in here.command("check-config")


def test_off_nothing_of_traces_is_loaded() -> None:
    code = "import sys, gpuproxy.proxy.worker, gpuproxy.control.app; print([m for m in sys.modules if 'trace' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout
    assert not [name for name in ("gpuproxy.proxy.traced", "gpuproxy.control.traces", "otlp") if name in loaded]


def test_headers_that_cannot_be_read_stop_the_start_with_one_line(place: MakePlace) -> None:
    here = place(traces={"endpoint": "http://127.0.0.1:9/v1/traces", "headers_env": "TRACE_HEADERS"})
    with process(here, {"TRACE_HEADERS": "s3cret"}) as started:
        assert started.wait(START_S) == 1
    told = here.log.read_text()
    assert "spans cannot be sent; see [traces]" in told
    assert "s3cret" not in told
