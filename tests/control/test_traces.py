"""Spans on their way to a receiver: in batches, within bounds, and nothing waits for it."""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from observe.test_spans import ATTEMPT, traced
from observe.test_traffic import CALL
from otlp_receiver import Receiver
from processes.gateways import until

from gpuproxy.config import Traces
from gpuproxy.control.traces import Exporter, headers_of
from gpuproxy.errors import ConfigError
from gpuproxy.types import Receipt

WAIT_S = 5.0


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().running() as running:
        yield running


class Sending:
    """An exporter and what it counted."""

    def __init__(self, receiver: Receiver, **says: Any) -> None:
        settings = {"endpoint": receiver.url, "interval_s": 0.01, "timeout_s": WAIT_S, **says}
        environment = {"HEADERS": "authorization=Bearer%20s3cret,x-team=a"}
        self.exporter = Exporter(Traces(**settings), "node-1", environment)
        self.counted: Counter[str] = Counter()
        self.exporter.count = self._count
        self.stopping = asyncio.Event()

    def _count(self, outcome: str, calls: int) -> None:
        self.counted[outcome] += calls

    def add(self, *numbers: int) -> None:
        self.exporter.add([call(number) for number in numbers])


def call(number: int) -> Receipt:
    return traced(ATTEMPT, request_id=f"q{number}")


def taken(receiver: Receiver) -> list[str]:
    """Return the request ids of the calls whose spans arrived, in order."""
    return [span.attributes["gpuproxy.request_id"] for span in receiver.spans if span.kind == 2]


async def test_calls_are_sent_in_batches_with_what_the_receiver_wants_to_know(receiver: Receiver) -> None:
    sending = Sending(receiver, batch_max=2, headers_env="HEADERS", service_name="edge")
    sending.exporter.add([CALL])  # nobody wants its spans
    sending.add(1, 2, 3)
    assert await sending.exporter.send_waiting()
    assert (taken(receiver), receiver.tried, sending.counted) == (["q1", "q2", "q3"], 2, {"sent": 3})
    assert receiver.headers["content-type"] == "application/x-protobuf"
    assert (receiver.headers["authorization"], receiver.headers["x-team"]) == ("Bearer s3cret", "a")
    resource = receiver.spans[0].resource
    assert (resource["service.name"], resource["service.instance.id"]) == ("edge", "node-1")
    await sending.exporter.close()


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_batch_the_receiver_cannot_take_now_is_sent_again(receiver: Receiver, status: int) -> None:
    sending = Sending(receiver)
    receiver.answers = [status]
    sending.add(1)
    assert not await sending.exporter.send_waiting()
    sending.add(2)
    assert await sending.exporter.send_waiting()
    assert (taken(receiver), receiver.tried, sending.counted) == (["q1", "q2"], 3, {"sent": 2})
    await sending.exporter.close()


@pytest.mark.parametrize("status", [301, 400, 401, 500])
async def test_a_batch_the_receiver_does_not_want_is_dropped_and_told_once(
    receiver: Receiver, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sending = Sending(receiver, batch_max=1)
    receiver.answers = [status] * 2
    sending.add(1, 2, 3)
    assert await sending.exporter.send_waiting()
    assert (taken(receiver), receiver.tried, sending.counted) == (["q3"], 3, {"refused": 2, "sent": 1})
    told = capsys.readouterr().out
    assert (told.count("spans cannot be sent"), told.count("spans are sent again")) == (1, 1)
    assert f"it answered {status}" in told
    await sending.exporter.close()


async def test_while_the_receiver_is_away_the_queue_is_bounded_and_drops_are_counted(receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    sending = Sending(receiver, endpoint=f"http://127.0.0.1:{port}/v1/traces", queue_max=3, batch_max=2)
    sending.add(1, 2)
    assert not await sending.exporter.send_waiting()
    sending.add(3, 4)
    sending.add(5)
    assert sending.counted == {"dropped": 2}
    sending.exporter._settings = Sending(receiver, queue_max=3, batch_max=2).exporter._settings  # it is back
    assert await sending.exporter.send_waiting()
    assert (taken(receiver), sending.counted) == (["q1", "q2", "q3"], {"dropped": 2, "sent": 3})
    await sending.exporter.close()


async def test_a_receiver_that_hangs_delays_nothing_but_spans(receiver: Receiver) -> None:
    sending = Sending(receiver, queue_max=10)
    running = asyncio.create_task(sending.exporter.run(sending.stopping))
    receiver.gate.clear()
    sending.add(0)
    await until(lambda: receiver.tried, WAIT_S, "the first batch")
    for number in range(1, 1_000):
        sending.add(number)
    assert sending.counted == {"dropped": 990}
    receiver.gate.set()
    await until(lambda: sending.counted["sent"] == 10, WAIT_S, "the rest")
    sending.stopping.set()
    await running
    await sending.exporter.close()
    assert taken(receiver) == [f"q{number}" for number in range(10)]


async def test_an_answer_that_does_not_come_in_time_is_waited_for_no_longer(receiver: Receiver) -> None:
    sending = Sending(receiver, timeout_s=0.05)
    receiver.gate.clear()
    sending.add(1)
    assert not await sending.exporter.send_waiting()
    receiver.gate.set()
    assert await sending.exporter.send_waiting()
    await sending.exporter.close()
    assert sending.counted == {"sent": 1}


async def test_a_receiver_that_is_not_well_is_asked_ever_more_rarely(receiver: Receiver) -> None:
    sending = Sending(receiver, interval_s=2.0)
    receiver.answers = [503, 503]
    sending.add(1)
    is_well = await sending.exporter.send_waiting()
    assert [sending.exporter.pause_s(is_well, before_s) for before_s in (2.0, 4.0, 20.0)] == [4.0, 8.0, 30.0]
    receiver.retry_after = "7"
    is_well = await sending.exporter.send_waiting()
    assert [sending.exporter.pause_s(is_well, before_s) for before_s in (2.0, 4.0)] == [7.0, 8.0]
    is_well = await sending.exporter.send_waiting()
    assert sending.exporter.pause_s(is_well, 30.0) == 2.0
    await sending.exporter.close()


async def test_the_end_sends_what_waits_or_counts_it_as_lost(receiver: Receiver) -> None:
    sending = Sending(receiver, timeout_s=0.2)
    sending.add(1)
    await sending.exporter.close()
    assert (taken(receiver), sending.counted) == (["q1"], {"sent": 1})
    late = Sending(receiver, timeout_s=0.2)
    receiver.gate.clear()
    late.add(2, 3)
    await late.exporter.close()
    assert late.counted == {"dropped": 2}


def test_headers_are_read_as_opentelemetry_writes_them() -> None:
    environment = {"H": "a=1, b = x%2Cy%3D ,,c==", "BAD": "s3cret"}
    assert headers_of("H", environment) == {"a": "1", "b": "x,y=", "c": "="}
    assert headers_of("", environment) == headers_of("NONE", environment) == {}
    with pytest.raises(ConfigError, match="BAD is not of the form") as raised:
        headers_of("BAD", environment)
    assert "s3cret" not in str(raised.value)
