"""Gauges that are read off what workers told."""

from gpuproxy.control.metrics import endpoint_calls, open_breakers, waiting_calls
from gpuproxy.link.messages import EndpointState

from .conftest import Api

A, B = "http://127.0.0.1:1", "http://127.0.0.1:2"


def told(url: str, state: str, open_count: int) -> EndpointState:
    return EndpointState("llm", url, state, open_count, 9, 1, 1, 0)


def test_states_of_all_workers_are_summed_by_endpoint() -> None:
    states = [told(A, "closed", 2), told(A, "open", 1), told(B, "half_open", 0), told(A, "half_open", 4)]
    assert open_breakers(states) == {("llm", A): 2, ("llm", B): 1}
    assert endpoint_calls(states) == {("llm", A): 7, ("llm", B): 0}


async def test_a_provider_without_rentals_has_none_and_not_no_number(api: Api) -> None:
    async with api.client.get("/metrics") as answer:
        assert 'gpuproxy_active_instances{provider="simulated"} 0.0' in (await answer.text()).splitlines()


def test_calls_that_wait_are_added_up_over_workers() -> None:
    assert waiting_calls([("one", 2), ("two", 1), ("one", 3)]) == {("one",): 5, ("two",): 1}
