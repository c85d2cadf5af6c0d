"""What a client does, step by step, with nothing behind it: no server, no clock."""

from types import SimpleNamespace
from typing import Any

import pytest

from gpuproxy.client import InstanceFailedError, UnavailableError
from gpuproxy.client import steps as module
from gpuproxy.client.calls import Call
from gpuproxy.client.errors import failed
from gpuproxy.client.steps import Planner, Steps, Wait

PENDING = {"data": {"contract_id": "c1", "status": "provisioning"}}
RUNNING = {"data": {"contract_id": "c1", "status": "running", "ip": "10.0.0.1"}}


def play(steps: Steps[Any], *came: Any) -> tuple[list[Call | Wait], Any]:
    """Answer each call with the next of `came`, an exception by throwing it; return all steps and the result."""
    answers, taken = iter(came), []
    try:
        step = next(steps)
        while True:
            taken.append(step)
            if isinstance(step, Wait):
                step = steps.send(None)
            elif isinstance(answer := next(answers), BaseException):
                step = steps.throw(answer)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        return taken, end.value


def busy(retry_after_s: int | None = None) -> Exception:
    return failed("busy", "UNAVAILABLE", 503, "", retry_after_s)


def test_a_refused_call_is_the_same_call_again_after_a_wait() -> None:
    taken, result = play(Planner(9.0, 2).call("POST", "/webhooks", {"url": "u"}), busy(3), busy(), {"data": 1})
    calls = [step for step in taken if isinstance(step, Call)]
    waits = [step.seconds for step in taken if isinstance(step, Wait)]
    assert (result, len(calls), len({id(call) for call in calls})) == ({"data": 1}, 3, 1)
    assert calls[0].headers["Idempotency-Key"]
    assert (calls[0].wait_s, len(waits)) == (9.0, 2)
    assert 3 <= waits[0] < 3.2
    assert 0.5 <= waits[1] <= 1


def test_the_last_refusal_is_raised() -> None:
    with pytest.raises(UnavailableError):
        play(Planner(9.0, 1).call("GET", "/health"), busy(), busy())


def test_an_instance_is_looked_at_until_it_runs() -> None:
    steps = Planner(9.0, 0).create_instance("vast.ai", "7", {}, 60.0, 2.5)
    taken, result = play(steps, PENDING, PENDING, RUNNING)
    told = [step.seconds if isinstance(step, Wait) else f"{step.method} {step.path}" for step in taken]
    look = "GET gpu/rentals/c1"
    assert told == ["POST gpu/instances/vast.ai/7", 2.5, look, 2.5, look]
    assert result["ip"] == "10.0.0.1"


def test_an_instance_that_need_not_be_waited_for_is_returned_as_it_is() -> None:
    taken, result = play(Planner(9.0, 0).create_instance("vast.ai", "7", {}, None, 2.5), PENDING)
    assert (len(taken), result["status"]) == (1, "provisioning")


def test_an_instance_that_does_not_come_up_in_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 59.0, 60.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(InstanceFailedError, match="after 60 s") as raised:
        play(Planner(9.0, 0).create_instance("vast.ai", "7", {}, 60.0, 2.5), PENDING, PENDING, PENDING)
    assert raised.value.contract_id == "c1"


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (KeyboardInterrupt(), True),
        (failed("broken", "CONNECTION_FAILED"), True),
        (failed("provider", "PROVIDER_FAILED", 502), True),
        (failed("taken", "CAPACITY_GONE", 409), False),
        (failed("busy", "UNAVAILABLE", 503), False),
    ],
)
def test_who_does_not_hear_whether_it_has_rented_is_told_to_look(error: BaseException, is_told: bool) -> None:
    with pytest.raises(type(error)) as raised:
        play(Planner(9.0, 0).create_instance("vast.ai", "7", {}, 60.0, 2.5), error)
    assert ["7 of vast.ai may be rented" in note for note in getattr(raised.value, "__notes__", [])] == [True] * is_told


def test_only_a_streamed_call_is_opened() -> None:
    for is_stream in (True, False):
        steps = Planner(9.0, 0).proxy_request("https", "http://x", None, None, None, is_stream, None)
        (call,), _ = play(steps, {})
        assert isinstance(call, Call)
        assert call.is_stream is is_stream
