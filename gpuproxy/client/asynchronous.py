"""The client for code in an event loop, on aiohttp; method for method as the other."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal, Self, overload

import aiohttp

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
from gpuproxy.client.happening import happening
from gpuproxy.client.instances import POLL_S, WAIT_S
from gpuproxy.client.steps import Planner, Result, Steps, Wait

Sleep = Callable[[float], Awaitable[None]]


class AsyncProxyStream:
    """An upstream's streamed answer as it arrives: iterate for bytes, close when leaving early."""

    def __init__(self, response: aiohttp.ClientResponse, content: bytes = b"") -> None:
        self._response = response
        self._content = content  # what of the body is read already
        self.status_code = response.status
        self.headers: Mapping[str, str] = response.headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in the pieces it arrives in. Raises GpuproxyError when it breaks off."""
        async with self:
            try:
                if self._content:
                    yield self._content
                async for piece in self._response.content.iter_any():
                    yield piece
            except (aiohttp.ClientError, TimeoutError) as error:
                raise no_answer(error, isinstance(error, TimeoutError)) from error

    async def __aenter__(self) -> Self:
        """Return the stream; leaving the block closes it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the stream; the gateway then aborts the upstream call."""
        self.close()

    def close(self) -> None:
        """Drop the connection unless all was read; an unfinished upstream call is aborted."""
        self._response.close()


class AsyncClient:
    """A caller of one gateway in one event loop; close it or use it in an ``async with`` block.

    The arguments are those of `Client`.
    """

    def __init__(
        self,
        api_url: str,
        api_key: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = RETRIES,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.api_url = check_url(api_url)
        self._api_key = check_key(api_key)
        self._sleep = sleep
        self._plan = Planner(timeout_s, retries)
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Return the client; leaving the block closes it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._opened is not None:
            await self._opened.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        """Return the session, which can be made in a running loop only."""
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                headers={"X-API-Key": self._api_key}, cookie_jar=aiohttp.DummyCookieJar(), trust_env=True
            )
        return self._opened

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return what GET `path` (below the API URL) answers, decoded. Raises GpuproxyError."""
        return await self._run(self._plan.call("GET", path, params=params))

    async def post(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by POST and return the decoded answer. Raises GpuproxyError."""
        return await self._run(self._plan.call("POST", path, body))

    async def put(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by PUT and return the decoded answer. Raises GpuproxyError."""
        return await self._run(self._plan.call("PUT", path, body))

    async def patch(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by PATCH and return the decoded answer. Raises GpuproxyError."""
        return await self._run(self._plan.call("PATCH", path, body))

    async def delete(self, path: str) -> Any:
        """Return what DELETE `path` answers, decoded; None when it answers nothing. Raises GpuproxyError."""
        return await self._run(self._plan.call("DELETE", path))

    async def list_gpus(self, provider: str = "all", min_vram: float | None = None, **filters: Any) -> Listing:
        """Return the GPUs that can be rented, each a dict; the list also answers ``["count"]``.

        `min_vram` is in GB. `filters` are the other parameters of ``GET /gpu/instances``, such as max_price.
        At most 100 come at once, or `limit`; if ``gpus.fields`` has a next_cursor, more come with it as `cursor`.
        """
        return await self._run(self._plan.list_gpus(provider, min_vram, filters))

    async def create_instance(
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
        return await self._run(steps)

    async def destroy_instance(self, provider: str, contract_id: str) -> Any:
        """End a rented instance; again does nothing."""
        return await self._run(self._plan.destroy_instance(provider, contract_id))

    @overload
    async def proxy_request(
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
    async def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        stream: Literal[True],
        timeout_s: float | None = None,
    ) -> AsyncProxyStream: ...

    @overload
    async def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any] | AsyncProxyStream: ...

    async def proxy_request(
        self,
        protocol: str,
        target_url: str,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any] | AsyncProxyStream:
        """Send one call through the gateway and return its envelope, or its stream; as `Client.proxy_request`."""
        steps = self._plan.proxy_request(protocol, target_url, method, headers, body, stream, timeout_s)
        answer: dict[str, Any] | AsyncProxyStream = await self._run(steps)
        return answer

    def events(self, channels: Iterable[str], last_event_id: str = "") -> AsyncGenerator[dict[str, Any]]:
        """Yield what happens on the channels, each a dict of type, payload, id; comes back after every break.

        With `last_event_id` it begins with what happened since. Raises GpuproxyError if a channel is refused, or if the
        gateway was never reached.
        """
        return happening(lambda: self._http, self.api_url, tuple(channels), last_event_id, self._sleep)

    async def _run(self, steps: Steps[Result]) -> Result:
        resume: Callable[[Any], Call | Wait] = steps.send
        came: Any = None
        try:
            while True:
                step = resume(came)
                try:
                    resume, came = steps.send, await self._do(step)
                except BaseException as error:  # an interruption too: the steps know what is left behind
                    resume, came = steps.throw, error
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            steps.close()

    async def _do(self, step: Call | Wait) -> Any:
        if isinstance(step, Wait):
            return await self._sleep(step.seconds)
        return await (self._open_stream(step) if step.is_stream else self._once(step))

    async def _once(self, call: Call) -> Any:
        response = await self._send(call)
        content = await _read(response)
        return answer_of(str(response.url), response.status, response.headers, content)

    async def _open_stream(self, call: Call) -> AsyncProxyStream:
        response = await self._send(call)
        if not may_be_refusal(response.status, response.headers):
            return AsyncProxyStream(response)
        content = await _read(response)
        if refusal := own_refusal(response.status, response.headers, content, is_stream=True):
            raise refusal
        return AsyncProxyStream(response, content)

    async def _send(self, call: Call) -> aiohttp.ClientResponse:
        bounds = aiohttp.ClientTimeout(
            total=None, connect=call.wait_s, sock_connect=CONNECT_TIMEOUT_S, sock_read=call.wait_s
        )
        try:
            return await self._http.request(
                call.method,
                f"{self.api_url}/{call.path}",
                params=call.params or None,
                data=call.body,
                headers=call.headers,
                timeout=bounds,
                allow_redirects=False,  # an upstream's would carry the key away
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise no_answer(error, isinstance(error, TimeoutError)) from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    try:
        return await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise no_answer(error, isinstance(error, TimeoutError)) from error
