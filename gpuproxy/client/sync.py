"""The client for ordinary code, on httpx."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal, Self, overload

import httpx

from gpuproxy.client.calls import (
    CONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    RETRIES,
    Call,
    Listing,
    answer_of,
    check_key,
    check_url,
    may_be_refusal,
    own_refusal,
)
from gpuproxy.client.errors import no_answer
from gpuproxy.client.instances import POLL_S, WAIT_S
from gpuproxy.client.steps import Planner, Result, Steps, Wait


class ProxyStream:
    """An upstream's streamed answer as it arrives: iterate for bytes, close when leaving early."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status_code = response.status_code
        self.headers: Mapping[str, str] = response.headers

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body in the pieces it arrives in. Raises GpuproxyError when it breaks off."""
        with self:
            try:
                yield from self._response.iter_bytes()
            except httpx.RequestError as error:
                raise no_answer(error, isinstance(error, httpx.TimeoutException)) from error

    def __enter__(self) -> Self:
        """Return the stream; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the stream; the gateway then aborts the upstream call."""
        self.close()

    def close(self) -> None:
        """Give the connection back; an unfinished upstream call is aborted."""
        self._response.close()


class Client:
    """A caller of one gateway. Safe to share between threads; close it or use it in a ``with`` block.

    ``api_url`` ends in the version, as in ``http://localhost:8080/api/v1``. ``timeout_s`` bounds each wait
    for bytes. ``retries`` is how often a call is repeated that may be. Raises ValueError for a URL or a key that
    cannot be.
    """

    def __init__(
        self,
        api_url: str,
        api_key: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.api_url = check_url(api_url)
        self._api_key = check_key(api_key)
        self._timeout_s = timeout_s
        self._retries = retries
        self._sleep = sleep
        self._plan = Planner(timeout_s, retries)
        self._http = httpx.Client(
            headers={"X-API-Key": self._api_key}, timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        )
        self._http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))  # they are an upstream's

    def __enter__(self) -> Self:
        """Return the client; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return what GET `path` (below the API URL) answers, decoded. Raises GpuproxyError."""
        return self._run(self._plan.call("GET", path, params=params))

    def post(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by POST and return the decoded answer. Raises GpuproxyError."""
        return self._run(self._plan.call("POST", path, body))

    def put(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by PUT and return the decoded answer. Raises GpuproxyError."""
        return self._run(self._plan.call("PUT", path, body))

    def patch(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by PATCH and return the decoded answer. Raises GpuproxyError."""
        return self._run(self._plan.call("PATCH", path, body))

    def delete(self, path: str) -> Any:
        """Return what DELETE `path` answers, decoded; None when it answers nothing. Raises GpuproxyError."""
        return self._run(self._plan.call("DELETE", path))

    def list_gpus(self, provider: str = "all", min_vram: float | None = None, **filters: Any) -> Listing:
        """Return the GPUs that can be rented, each a dict; the list also answers ``["count"]``.

        `min_vram` is in GB. `filters` are the other parameters of ``GET /gpu/instances``, such as max_price.
        At most 100 come at once, or `limit`; if ``gpus.fields`` has a next_cursor, more come with it as `cursor`.
        """
        return self._run(self._plan.list_gpus(provider, min_vram, filters))

    def create_instance(
        self,
        provider: str,
        instance_id: str,
        config: Mapping[str, Any] | None = None,
        wait: bool = True,
        wait_s: float = WAIT_S,
        poll_s: float = POLL_S,
    ) -> dict[str, Any]:
        """Rent the offer `instance_id` and return it, by default when it runs: ``["ip"]``, ``["contract_id"]``.

        Raises InstanceFailedError if it fails, does not run after `wait_s`, or is heard of no more; it is still rented
        then, as when the wait is interrupted: a note on the exception says which it is.
        """
        steps = self._plan.create_instance(provider, instance_id, config or {}, wait_s if wait else None, poll_s)
        return self._run(steps)

    def destroy_instance(self, provider: str, contract_id: str) -> Any:
        """End a rented instance; again does nothing."""
        return self._run(self._plan.destroy_instance(provider, contract_id))

    @overload
    def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: Literal[False] = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any]: ...

    @overload
    def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        stream: Literal[True],
        timeout_s: float | None = None,
    ) -> ProxyStream: ...

    @overload
    def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any] | ProxyStream: ...

    def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any] | ProxyStream:
        """Send one call through the gateway and return its envelope: data, status_code, headers, usage.

        The upstream's own refusal is no exception: it is told by ``status_code``. With `stream` the
        upstream's answer comes as a `ProxyStream` instead. `method` defaults to POST with a body, else GET.
        `timeout_s` bounds the upstream's answer. Raises GpuproxyError for the gateway's own failures.
        """
        steps = self._plan.proxy_request(protocol, target_url, method, headers, body, stream, timeout_s)
        answer: dict[str, Any] | ProxyStream = self._run(steps)
        return answer

    def events(self, channels: Iterable[str], last_event_id: str = "") -> Generator[dict[str, Any]]:
        """Yield what happens on the channels, each a dict of type, payload, id; comes back after every break.

        With `last_event_id` it begins with what happened since. Raises GpuproxyError if a channel is refused, or if the
        gateway was never reached. Not for code in an event loop: there is AsyncClient.
        """
        import asyncio

        from gpuproxy.client.asynchronous import AsyncClient

        with asyncio.Runner() as runner:
            client = AsyncClient(self.api_url, self._api_key, self._timeout_s, self._retries)
            happening = client.events(tuple(channels), last_event_id)
            try:
                while True:
                    yield runner.run(anext(happening))
            finally:
                runner.run(happening.aclose())
                runner.run(client.close())

    def _run(self, steps: Steps[Result]) -> Result:
        resume: Callable[[Any], Call | Wait] = steps.send
        came: Any = None
        try:
            while True:
                step = resume(came)
                try:
                    resume, came = steps.send, self._do(step)
                except BaseException as error:  # an interruption too: the steps know what is left behind
                    resume, came = steps.throw, error
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            steps.close()

    def _do(self, step: Call | Wait) -> Any:
        if isinstance(step, Wait):
            return self._sleep(step.seconds)
        return self._open_stream(step) if step.is_stream else self._once(step)

    def _once(self, call: Call) -> Any:
        response = self._send(call, stream=False)
        return answer_of(str(response.request.url), response.status_code, response.headers, response.content)

    def _open_stream(self, call: Call) -> ProxyStream:
        response = self._send(call, stream=True)
        if may_be_refusal(response.status_code, response.headers):
            try:
                content = response.read()
            except httpx.RequestError as error:
                raise no_answer(error, isinstance(error, httpx.TimeoutException)) from error
            if refusal := own_refusal(response.status_code, response.headers, content, is_stream=True):
                raise refusal
        return ProxyStream(response)

    def _send(self, call: Call, stream: bool) -> httpx.Response:
        request = self._http.build_request(
            call.method,
            f"{self.api_url}/{call.path}",
            params=call.params or None,
            content=call.body,
            headers=call.headers,
            timeout=httpx.Timeout(call.wait_s, connect=CONNECT_TIMEOUT_S),
        )
        try:
            return self._http.send(request, stream=stream)
        except httpx.RequestError as error:
            raise no_answer(error, isinstance(error, httpx.TimeoutException)) from error
