"""What both clients have in common, without I/O: how a call is written, how its answer is read, whether it is repeated.

Repeated is what the gateway refused before anything happened (429, 503), and what broke in between if it cannot happen
twice: any method but POST, or a POST that makes something and carries an Idempotency-Key.
"""

import random
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec
from msgspec import UNSET, Struct

from gpuproxy.client.errors import GpuproxyError, failed
from gpuproxy.codec.retry_after import seconds_asked

DEFAULT_TIMEOUT_S = 600.0  # an answer of a large model may take minutes
CONNECT_TIMEOUT_S = 5.0
GRACE_S = 5.0  # lets the gateway's own 504 arrive before this side gives up
RETRIES = 2
WAIT_S = 0.5  # before the first repetition, twice as long before each further one
WAIT_S_MAX = 8.0
REFUSAL_BYTES_MAX = 65_536
RETRY_AFTER_S_MAX = 60  # who is asked to wait longer is told so

# POSTs that make something and heed Idempotency-Key.
MAKES = re.compile(
    r"auth/apikey(/[^/]+/rotate)?|webhooks(/billing|/[^/]+/rotate-secret)?|gpu/instances/(reserve|[^/]+/[^/]+)"
    r"|(user|admin)/budgets|billing/(checkout|refunds|payments/[^/]+/confirm)|admin/(credits/(add|take)|prices)"
)
NOTHING_HAPPENED = (429, 503)
MAY_HAVE_HAPPENED = ("CONNECTION_FAILED", "TIMED_OUT", "INTERNAL", "CONFLICT")


class Call(Struct, frozen=True):
    """One call; `path` is below the API URL. With `is_stream` its answer is opened, not read."""

    method: str
    path: str
    body: bytes | None = None
    params: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    wait_s: float = DEFAULT_TIMEOUT_S
    is_stream: bool = False

    @property
    def is_repeatable(self) -> bool:
        """Tell whether the call may reach the gateway twice."""
        return self.method != "POST" or "Idempotency-Key" in self.headers


def call_of(
    method: str, path: str, body: Any = None, params: Mapping[str, Any] | None = None, wait_s: float = DEFAULT_TIMEOUT_S
) -> Call:
    """Write a call; one that makes something gets an Idempotency-Key."""
    path = path.lstrip("/")
    headers = {} if body is None else {"Content-Type": "application/json"}
    if method == "POST" and MAKES.fullmatch(path.partition("?")[0]):
        headers["Idempotency-Key"] = str(uuid4())
    encoded = None if body is None else msgspec.json.encode(body)
    return Call(method, path, encoded, _texts(params or {}), headers, wait_s)


def check_url(api_url: str) -> str:
    """Return the URL without a slash at its end. Raises ValueError for one that leads nowhere."""
    remedy = "write it like http://localhost:8080/api/v1"
    try:
        parts = urlsplit(api_url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(f"api_url {api_url!r} is no URL ({error}); {remedy}") from None
    if not is_good or any(character.isspace() for character in api_url):
        raise ValueError(f"api_url {api_url!r} is no http or https URL; {remedy}")
    return api_url.rstrip("/")


def check_key(api_key: str) -> str:
    """Return the key. Raises ValueError, which does not show it, for one that no header can carry."""
    if not all(33 <= ord(character) <= 126 for character in api_key):
        raise ValueError("api_key holds a space, a line break or another character that no key has; strip it")
    return api_key


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    given = {name: value for name, value in params.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}


class Envelope(Struct):
    """A proxied call."""

    protocol: str
    target_url: str
    method: str | msgspec.UnsetType = UNSET
    headers: Mapping[str, str] | msgspec.UnsetType = UNSET
    body: Any = UNSET
    stream: bool | msgspec.UnsetType = UNSET
    timeout_s: float | msgspec.UnsetType = UNSET


def proxied(
    protocol: str,
    target_url: str,
    method: str | None,
    headers: Mapping[str, str] | None,
    body: Any,
    stream: bool,
    timeout_s: float | None,
    default_s: float,
) -> Call:
    """Write a proxied call. Raises ValueError for a body that asks for a stream nobody would read."""
    if not stream and isinstance(body, Mapping) and body.get("stream") is True:
        raise ValueError("the body asks for a stream; call with stream=True to receive one")
    given: list[Any] = [
        UNSET if value is None else value for value in (method, headers, body, stream or None, timeout_s)
    ]
    envelope = Envelope(protocol, target_url, *given)
    call = call_of("POST", "/gpu/proxy", envelope, wait_s=default_s if timeout_s is None else timeout_s + GRACE_S)
    return msgspec.structs.replace(call, is_stream=stream)


class _Refusal(Struct):
    error: str
    code: str
    request_id: str = ""


def may_be_refusal(status: int, headers: Mapping[str, str]) -> bool:
    """Tell whether a stream's head may be that of the gateway's own refusal, which is short and says how long it is."""
    length = headers.get("Content-Length", "")
    return status >= 400 and length.isdecimal() and int(length[:9]) <= REFUSAL_BYTES_MAX


def own_refusal(
    status: int, headers: Mapping[str, str], content: bytes, is_stream: bool = False
) -> GpuproxyError | None:
    """Return the gateway's own refusal if the answer is one, else None.

    Where an upstream's answer may come instead, ours is told by the request id, which the gateway alone gives.
    """
    try:
        told = msgspec.json.decode(content, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    given_id = headers.get("X-Request-Id", "")
    if is_stream and not (told.request_id and told.request_id == given_id):
        return None
    wait_s = seconds_asked(headers.get("Retry-After", ""), time.time())
    return failed(told.error, told.code, status, told.request_id or given_id, wait_s)


def answer_of(url: str, status: int, headers: Mapping[str, str], content: bytes) -> Any:
    """Return the decoded answer, None for an empty one. Raises GpuproxyError."""
    request_id = headers.get("X-Request-Id", "")
    if status >= 300:
        led = f", which leads to {headers['Location'][:200]}: is api_url right?" if "Location" in headers else ""
        wait_s = seconds_asked(headers.get("Retry-After", ""), time.time())
        stranger = failed(f"{url} answered {status}{led}", "INVALID_ANSWER", status, request_id, wait_s)
        raise own_refusal(status, headers, content) or stranger
    if not content:
        return None
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"{url} answered {status} with something else than JSON: {error}"
        raise failed(message, "INVALID_ANSWER", 0, request_id) from error


def wait_before_retry(call: Call, error: GpuproxyError, retries_done: int, retries_max: int) -> float | None:
    """Return how many seconds to wait before the call is repeated; None if it is not."""
    is_ours = error.code != "INVALID_ANSWER"  # something in between may say 503 of a call that the gateway has
    is_safe = error.status in NOTHING_HAPPENED and (is_ours or call.is_repeatable)
    is_safe = is_safe or (call.is_repeatable and error.code in MAY_HAVE_HAPPENED)
    if error.code == "CONFLICT" and error.retry_after_s is None:
        is_safe = False  # only the call with the same key that still runs is worth a wait
    if not is_safe or retries_done >= retries_max or (error.retry_after_s or 0) > RETRY_AFTER_S_MAX:
        return None
    backoff = min(WAIT_S_MAX, WAIT_S * 2**retries_done) * random.uniform(0.5, 1)  # noqa: S311 (jitter, no secret)
    return backoff if error.retry_after_s is None else error.retry_after_s + random.uniform(0, 0.1)  # noqa: S311


class Listing(list[dict[str, Any]]):
    """A list that also answers the other fields of the gateway's answer, as in ``gpus["count"]``."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(answer["data"])
        self.fields = dict(answer)

    def __getitem__(self, key: Any) -> Any:
        """Return an item by its place, or a field of the answer by its name."""
        return self.fields[key] if isinstance(key, str) else super().__getitem__(key)


def gpus_call(provider: str, min_vram: float | None, filters: Mapping[str, Any], wait_s: float) -> Call:
    """Write the call that lists GPUs."""
    params = {"provider": provider, "min_vram": min_vram, **filters}
    return call_of("GET", "/gpu/instances", params=params, wait_s=wait_s)
