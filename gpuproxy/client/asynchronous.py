"""The client for code in an event loop, on aiohttp; method for method as the other."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from itertools import count
from types import TracebackType
from typing import Any, Literal, Self, overload

import aiohttp

from gpuproxy.client.calls import (
    CONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    RETRIES,
    Call,
    Listing,
    answer_of,
    call_of,
    gpus_call,
    own_refusal,
    proxied,
    wait_before_retry,
)
from gpuproxy.client.errors import GpuproxyError, failed
from gpuproxy.client.happening import happening
from gpuproxy.client.instances import (
    POLL_S,
    WAIT_S,
    instance_path,
    is_up,
    not_in_time,
    progress,
    rental_of,
    rental_path,
)

Sleep = Callable[[float], Awaitable[None]]


class AsyncProxyStream:
    """An upstream's streamed answer as it arrives: iterate for bytes, close when leaving early."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status_code = response.status
        self.headers: Mapping[str, str] = response.headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in the pieces it arrives in. Raises GpuproxyError when it breaks off."""
        async with self:
            try:
                async for piece in self._response.content.iter_any():
                    yield piece
            except (aiohttp.ClientError, TimeoutError) as error:
                raise _transport_failure(error) from error

    async def __aenter__(self) -> Self:
        """Return the stream; leaving the block closes it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self.api_url = api_url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._retries = retries
        self._sleep = sleep
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Return the client; leaving the block closes it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        return await self._call(call_of("GET", path, params=params, wait_s=self._timeout_s))

    async def post(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by POST and return the decoded answer. Raises GpuproxyError."""
        return await self._call(call_of("POST", path, body, wait_s=self._timeout_s))

    async def put(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by PUT and return the decoded answer. Raises GpuproxyError."""
        return await self._call(call_of("PUT", path, body, wait_s=self._timeout_s))

    async def delete(self, path: str) -> Any:
        """Return what DELETE `path` answers, decoded; None when it answers nothing. Raises GpuproxyError."""
        return await self._call(call_of("DELETE", path, wait_s=self._timeout_s))

    async def list_gpus(self, provider: str = "all", min_vram: float | None = None, **filters: Any) -> Listing:
        """Return the GPUs that can be rented, each a dict; the list also answers ``["count"]``.

        `min_vram` is in GB. `filters` are the other parameters of ``GET /gpu/instances``, such as max_price.
        """
        return Listing(await self._call(gpus_call(provider, min_vram, filters, self._timeout_s)))

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

        Raises InstanceFailedError if it fails, or does not run after `wait_s`; it is still rented then.
        """
        path = instance_path(provider, instance_id)
        rental = rental_of(await self._call(call_of("POST", path, config or {}, wait_s=self._timeout_s)))
        return await self._until_up(rental, wait_s, poll_s) if wait else rental

    async def _until_up(self, rental: dict[str, Any], wait_s: float, poll_s: float) -> dict[str, Any]:
        until = time.monotonic() + wait_s
        with progress(rental) as show:
            while not is_up(rental):
                if time.monotonic() >= until:
                    raise not_in_time(rental, wait_s)
                await self._sleep(poll_s)
                rental = rental_of(await self.get(rental_path(rental)))
                show(rental["status"])
        return rental

    async def destroy_instance(self, provider: str, contract_id: str) -> Any:
        """End a rented instance; again does nothing."""
        return await self.delete(instance_path(provider, contract_id))

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
        call = proxied(protocol, target_url, method, headers, body, stream, timeout_s, self._timeout_s)
        if stream:
            opened: AsyncProxyStream = await self._repeated(call, self._open_stream)
            return opened
        answer: dict[str, Any] = await self._call(call)
        return answer

    def events(self, channels: Iterable[str], last_event_id: str = "") -> AsyncGenerator[dict[str, Any]]:
        """Yield what happens on the channels, each a dict of type, payload, id; comes back after every break.

        With `last_event_id` it begins with what happened since. Raises GpuproxyError if a channel is refused.
        """
        return happening(self._http, self.api_url, tuple(channels), last_event_id, self._sleep)

    async def _call(self, call: Call) -> Any:
        return await self._repeated(call, self._once)

    async def _repeated(self, call: Call, work: Callable[[Call], Awaitable[Any]]) -> Any:
        for done in count():
            try:
                return await work(call)
            except GpuproxyError as error:
                wait_s = wait_before_retry(call, error, done, self._retries)
                if wait_s is None:
                    raise
            await self._sleep(wait_s)
        raise AssertionError  # the loop above has no end

    async def _once(self, call: Call) -> Any:
        response = await self._send(call)
        content = await _read(response)
        return answer_of(str(response.url), response.status, response.headers, content)

    async def _open_stream(self, call: Call) -> AsyncProxyStream:
        response = await self._send(call)
        if response.status >= 400:
            content = await _read(response)
            if refusal := own_refusal(response.status, response.headers, content):
                raise refusal
        return AsyncProxyStream(response)

    async def _send(self, call: Call) -> aiohttp.ClientResponse:
        bounds = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=call.wait_s)
        try:
            return await self._http.request(
                call.method,
                f"{self.api_url}/{call.path}",
                params=call.params or None,
                data=call.body,
                headers=call.headers,
                timeout=bounds,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _transport_failure(error) from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    try:
        return await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _transport_failure(error) from error


def _transport_failure(error: Exception) -> GpuproxyError:
    if isinstance(error, TimeoutError):
        return failed(f"no answer in time: {type(error).__name__}", "TIMED_OUT")
    return failed(f"the connection failed: {error or type(error).__name__}", "CONNECTION_FAILED")
