"""The client library: one gateway, one key, its calls as plain methods.

``gpuproxy.Client`` is a thin layer over httpx. Answers are the gateway's JSON as it came; failures are one
exception type that carries the gateway's error code. Nothing is retried: only the caller knows whether a
call may run twice.
"""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, overload

import httpx
import msgspec
from msgspec import Struct

DEFAULT_TIMEOUT_S = 600.0  # an answer of a large model may take minutes
CONNECT_TIMEOUT_S = 5.0
GRACE_S = 5.0  # lets the gateway's own 504 arrive before this side gives up


class GpuproxyError(Exception):
    """A call that failed; the gateway's own failures carry its error ``code`` and HTTP ``status``.

    ``status`` is 0 and ``code`` is CONNECTION_FAILED, TIMED_OUT or INVALID_ANSWER when no usable answer came.
    ``request_id`` finds the call in the gateway's log, empty when none was told. ``retry_after_s`` is what
    the gateway asked to wait, None if it did not.
    """

    def __init__(
        self, message: str, code: str, status: int = 0, request_id: str = "", retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """Return message, code and request id in one line."""
        return f"{self.message} ({self.code}, request {self.request_id or 'unknown'})"


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
            except httpx.TransportError as error:
                raise _transport_failure(error) from error

    def __enter__(self) -> Self:
        """Return the stream; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream; the gateway then aborts the upstream call."""
        self.close()

    def close(self) -> None:
        """Give the connection back; an unfinished upstream call is aborted."""
        self._response.close()


class Client:
    """A caller of one gateway. Safe to share between threads; close it or use it in a ``with`` block.

    ``api_url`` ends in the version, as in ``http://localhost:8080/api/v1``. ``timeout_s`` bounds each wait
    for bytes.
    """

    def __init__(self, api_url: str, api_key: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.api_url = api_url.rstrip("/")
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            headers={"X-API-Key": api_key}, timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        )

    def __enter__(self) -> Self:
        """Return the client; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return what GET `path` (below the API URL) answers, decoded. Raises GpuproxyError."""
        return self._call("GET", path, params=params)

    def post(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by POST and return the decoded answer. Raises GpuproxyError."""
        return self._call("POST", path, body)

    def put(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON by PUT and return the decoded answer. Raises GpuproxyError."""
        return self._call("PUT", path, body)

    def delete(self, path: str) -> Any:
        """Return what DELETE `path` answers, decoded; None when it answers nothing. Raises GpuproxyError."""
        return self._call("DELETE", path)

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
        if not stream and isinstance(body, Mapping) and body.get("stream") is True:
            raise ValueError("the body asks for a stream; call with stream=True to receive one")
        call = _Envelope(protocol, target_url, _or_unset(method), _or_unset(headers), _or_unset(body))
        call.stream = stream or msgspec.UNSET
        call.timeout_s = _or_unset(timeout_s)
        wait_s = self._timeout_s if timeout_s is None else timeout_s + GRACE_S
        if stream:
            return self._stream(call, wait_s)
        answer: dict[str, Any] = self._call("POST", "/gpu/proxy", call, wait_s=wait_s)
        return answer

    def _stream(self, call: "_Envelope", wait_s: float) -> ProxyStream:
        response = self._send("POST", "/gpu/proxy", call, None, wait_s, stream=True)
        if response.status_code >= 400 and (refusal := self._read_refusal(response)):
            raise refusal
        return ProxyStream(response)

    def _read_refusal(self, response: httpx.Response) -> GpuproxyError | None:
        try:
            response.read()
        except httpx.TransportError as error:
            raise _transport_failure(error) from error
        return _own_refusal(response)

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        wait_s: float | None = None,
    ) -> Any:
        response = self._send(method, path, body, params, wait_s or self._timeout_s, stream=False)
        if response.status_code >= 400:
            raise _refusal(response)
        if not response.content:
            return None
        try:
            return msgspec.json.decode(response.content)
        except msgspec.DecodeError as error:
            url, status = response.request.url, response.status_code
            message = f"{url} answered {status} with something else than JSON: {error}"
            raise GpuproxyError(message, "INVALID_ANSWER", 0, _request_id(response)) from error

    def _send(
        self, method: str, path: str, body: Any, params: Mapping[str, Any] | None, wait_s: float, stream: bool
    ) -> httpx.Response:
        request = self._http.build_request(
            method,
            f"{self.api_url}/{path.lstrip('/')}",
            params=params,
            content=None if body is None else msgspec.json.encode(body),
            headers=None if body is None else {"Content-Type": "application/json"},
            timeout=httpx.Timeout(wait_s, connect=CONNECT_TIMEOUT_S),
        )
        try:
            return self._http.send(request, stream=stream)
        except httpx.TransportError as error:
            raise _transport_failure(error) from error


class _Envelope(Struct):
    protocol: str
    target_url: str
    method: str | msgspec.UnsetType
    headers: Mapping[str, str] | msgspec.UnsetType
    body: Any
    stream: bool | msgspec.UnsetType = msgspec.UNSET
    timeout_s: float | msgspec.UnsetType = msgspec.UNSET


class _Refusal(Struct):
    error: str
    code: str
    request_id: str = ""


def _or_unset(value: Any) -> Any:
    return msgspec.UNSET if value is None else value


def _transport_failure(error: httpx.TransportError) -> GpuproxyError:
    if isinstance(error, httpx.TimeoutException):
        return GpuproxyError(f"no answer in time: {type(error).__name__}", "TIMED_OUT")
    return GpuproxyError(f"the connection failed: {error or type(error).__name__}", "CONNECTION_FAILED")


def _request_id(response: httpx.Response) -> str:
    return str(response.headers.get("x-request-id", ""))


def _own_refusal(response: httpx.Response) -> GpuproxyError | None:
    """Return the gateway's own refusal if the (read) answer is one, else None."""
    try:
        told = msgspec.json.decode(response.content, type=_Refusal)
    except msgspec.DecodeError:
        return None
    wait = response.headers.get("retry-after", "")
    retry_after_s = int(wait) if wait.isdecimal() else None
    return GpuproxyError(
        told.error, told.code, response.status_code, told.request_id or _request_id(response), retry_after_s
    )


def _refusal(response: httpx.Response) -> GpuproxyError:
    own = _own_refusal(response)
    if own is not None:
        return own
    message = f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
    return GpuproxyError(message, "INVALID_ANSWER", response.status_code, _request_id(response))
