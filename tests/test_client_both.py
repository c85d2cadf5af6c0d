"""What both clients do alike where something goes wrong: whose answer it was, who gets the key, what is left behind."""

import asyncio
import copy
import gzip
import pickle
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from scripted_gateway import ScriptedGateway, answer, scripted_gateway

import gpuproxy
from gpuproxy import client as errors
from gpuproxy.client.calls import MAKES, REFUSAL_BYTES_MAX
from gpuproxy.client.errors import failed
from gpuproxy.control.table import TABLE

REFUSED = {"error": "no", "code": "UNAVAILABLE", "request_id": "r-1"}


class Caller:
    """One of the clients, of a scripted gateway; `waits` is what it would have waited."""

    def __init__(self, url: str, is_async: bool) -> None:
        self._url, self._is_async = url, is_async
        self.waits: list[float] = []

    def __call__(self, method: str, *given: Any, **named: Any) -> Any:
        """Return what a method returns, of a stream its status and its bytes."""
        return asyncio.run(self._later(method, given, named)) if self._is_async else self._now(method, given, named)

    def _now(self, method: str, given: Any, named: Any) -> Any:
        with gpuproxy.Client(self._url, "gp_key", sleep=self.wait) as client:
            found = getattr(client, method)(*given, **named)
            return (found.status_code, b"".join(found)) if isinstance(found, errors.ProxyStream) else found

    async def _later(self, method: str, given: Any, named: Any) -> Any:
        async def sleep(seconds: float) -> None:
            self.wait(seconds)

        async with gpuproxy.AsyncClient(self._url, "gp_key", sleep=sleep) as client:
            found = await getattr(client, method)(*given, **named)
            if isinstance(found, errors.AsyncProxyStream):
                return found.status_code, b"".join([piece async for piece in found])
            return found

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)

    def stream(self) -> Any:
        return self("proxy_request", "https", "http://x.example", body={}, stream=True)


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as server:
        yield server


@pytest.fixture(params=[False, True], ids=["Client", "AsyncClient"])
def call(request: pytest.FixtureRequest, gateway: ScriptedGateway) -> Caller:
    return Caller(gateway.url, request.param)


@pytest.fixture
def elsewhere() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as server:
        yield server


def always(status: int, body: Any, **headers: str) -> Callable[[BaseHTTPRequestHandler, bytes], None]:
    return lambda handler, _: answer(handler, status, body, **headers)


def test_a_redirect_is_not_followed_so_the_key_stays_here(
    call: Caller, gateway: ScriptedGateway, elsewhere: ScriptedGateway
) -> None:
    gateway.script = always(307, b"", Location=elsewhere.url)
    assert call.stream() == (307, b"")
    with pytest.raises(errors.InvalidAnswerError, match="307, which leads to http://127"):
        call("get", "/user/usage")
    assert elsewhere.asked == []


def test_a_cookie_of_an_upstream_is_not_kept(gateway: ScriptedGateway) -> None:
    gateway.script = always(200, b"x", Set_Cookie="a=1; Path=/")
    with gpuproxy.Client(gateway.url, "gp_key") as client:
        for _ in range(2):
            assert b"".join(client.proxy_request("https", "http://x.example", stream=True)) == b"x"
    assert [headers.get("cookie") for _, _, headers, _ in gateway.asked] == [None, None]


@pytest.mark.parametrize("size", [20, REFUSAL_BYTES_MAX + 1])
def test_an_upstreams_refusal_is_handed_over_whole(call: Caller, gateway: ScriptedGateway, size: int) -> None:
    gateway.script = always(400, b"x" * size)
    assert call.stream() == (400, b"x" * size)


def test_an_upstream_that_refuses_as_the_gateway_would_is_not_taken_for_it(
    call: Caller, gateway: ScriptedGateway
) -> None:
    gateway.script = always(503, REFUSED, X_Request_Id="r-2", Retry_After="1")
    assert call.stream()[0] == 503
    assert (len(gateway.asked), call.waits) == (1, [])
    gateway.script = always(503, REFUSED, X_Request_Id="r-1", Retry_After="1")
    with pytest.raises(errors.UnavailableError):
        call.stream()
    assert len(gateway.asked) == 4


def test_what_something_in_between_refuses_may_have_happened(call: Caller, gateway: ScriptedGateway) -> None:
    gateway.script = always(503, b"<h1>sorry</h1>", Retry_After="2")
    for method, given, count in (("proxy_request", ("https", "http://x"), 1), ("post", ("/ws/ticket",), 1),
                                 ("get", ("/x",), 3), ("patch", ("/webhooks/x", {}), 3)):  # fmt: skip
        gateway.asked.clear()
        with pytest.raises(errors.InvalidAnswerError) as caught:
            call(method, *given)
        assert (len(gateway.asked), caught.value.retry_after_s) == (count, 2)


def test_a_date_in_retry_after_is_waited_for(call: Caller, gateway: ScriptedGateway) -> None:
    def script(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        when = formatdate(time.time() + 30, usegmt=True)
        answer(handler, *((429, REFUSED) if len(gateway.asked) == 1 else (200, {})), Retry_After=when)

    gateway.script = script
    assert call("get", "/x") == {}
    assert 20 < call.waits[0] < 32


def test_an_answer_that_cannot_be_unpacked_is_a_typed_failure(call: Caller, gateway: ScriptedGateway) -> None:
    gateway.script = always(200, gzip.compress(b"{}")[:-9] + b"nonsense!", Content_Encoding="gzip")
    for ask in (lambda: call("post", "/x"), call.stream):
        with pytest.raises(errors.ConnectionFailedError):
            ask()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, asyncio.CancelledError])
def test_who_is_interrupted_is_told_what_is_rented(
    call: Caller, gateway: ScriptedGateway, stop: type[BaseException]
) -> None:
    def wait(seconds: float) -> None:
        raise stop

    call.wait = wait  # type: ignore[method-assign]
    gateway.script = always(201, {"data": {"contract_id": "c-7", "status": "pending"}})
    with pytest.raises(stop) as caught:
        call("create_instance", "vast.ai", "1")
    notes = getattr(caught.value, "__notes__", None) or getattr(caught.value.__context__, "__notes__", [])
    assert ["c-7" in note for note in notes] == [True]


def test_who_hears_no_more_of_an_instance_is_told_which(call: Caller, gateway: ScriptedGateway) -> None:
    def script(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        rented = {"data": {"contract_id": "c-7", "status": "pending"}}
        answer(handler, *((201, rented) if handler.command == "POST" else (401, REFUSED)))

    gateway.script = script
    with pytest.raises(errors.InstanceFailedError, match="c-7 is rented") as caught:
        call("create_instance", "vast.ai", "1")
    assert caught.value.contract_id == "c-7"
    assert isinstance(caught.value.__cause__, errors.AuthenticationError)


@pytest.mark.parametrize("kind", [gpuproxy.Client, gpuproxy.AsyncClient])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(kind: Any) -> None:
    for key in ("gp_secret\n", " gp_secret", "gp_sécret", "gp_\x00secret"):
        with pytest.raises(ValueError, match="api_key holds") as caught:
            kind("http://127.0.0.1:1/api/v1", key)
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize("kind", [gpuproxy.Client, gpuproxy.AsyncClient])
@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8080/api/v1",
        "ftp://x/api/v1",
        "http://",
        "http://[x/api/v1",
        "http://x:99999/",
        "http://x/api/v1\n",
    ],
)
def test_a_url_that_leads_nowhere_is_refused_at_once(kind: Any, url: str) -> None:
    with pytest.raises(ValueError, match="write it like http://localhost:8080/api/v1"):
        kind(url, "gp_key")


def test_failures_travel_between_processes() -> None:
    found = [failed("m", code, status, "r-1", 3) for code, status in (("X", 404), ("UPSTREAM_TIMEOUT", 504), ("X", 0))]
    for error in (*found, errors.InstanceFailedError("m", "TIMED_OUT", "c-7")):
        error.add_note("noted")
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))


def test_every_post_that_heeds_a_key_gets_one() -> None:
    for route in TABLE:
        path = route.path.removeprefix("/api/v1/").replace("{id}", "x").replace("{provider}", "y")
        if route.method == "POST":
            assert (MAKES.fullmatch(path) is not None) == route.is_once, path
