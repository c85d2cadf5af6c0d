"""JSON calls to a provider's HTTP API: spaced, bounded, sent once, every failure of the way there mapped.

aiohttp is imported on the first call: workers load this module with the plugins and never call. When a connection
breaks, aiohttp sends a PUT or DELETE a second time by itself (RFC 9112 allows it), but at a marketplace a second PUT is
a second machine: `Once` prevents it. Connections are not kept, so that none is found closed. Redirects are not
followed, so that a credential stays where it belongs.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from gpuproxy.plugin import InvalidAnswer, Phase, ProviderSettings, ProviderUnavailable, RateLimited

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, ClientSession

ANSWER_BYTES_MAX = 32 << 20  # a search of all of vast.ai is about 5 MB
CHANGING: frozenset[Phase] = frozenset(("create", "start", "stop", "destroy"))  # look before asking again
SHOWN_MAX = 200  # characters of a provider's own words in a message

Thing = TypeVar("Thing")


class Answer(Struct):
    """What came back. Names of ``headers`` are in lower case."""

    phase: Phase
    status: int
    headers: dict[str, str]
    body: bytes


class Once:
    """A middleware of aiohttp's client that lets one request out, and no repetition of it."""

    def __init__(self) -> None:
        self._is_sent = False

    async def __call__(self, request: "ClientRequest", handler: "ClientHandlerType") -> "ClientResponse":
        """Send the request the first time."""
        if self._is_sent:
            import aiohttp

            raise aiohttp.ClientConnectionError("the request is not sent again")
        self._is_sent = True
        return await handler(request)


class Spacing:
    """When the next call of each kind may go out."""

    def __init__(self, least_s: Mapping[str, float], now_s: Callable[[], float] = time.monotonic) -> None:
        self._least_s = least_s
        self._now_s = now_s
        self._next_s: dict[str, float] = {}

    def take(self, kind: str, wait_max_s: float) -> tuple[bool, float]:
        """Take the next turn if it comes within `wait_max_s`; return whether, and how long until then."""
        now_s = self._now_s()
        turn_s = max(now_s, self._next_s.get(kind, 0.0))
        if turn_s - now_s > wait_max_s:
            return False, turn_s - now_s
        self._next_s[kind] = turn_s + self._least_s.get(kind, 0.0)
        return True, turn_s - now_s

    def hold(self, kind: str, seconds: float) -> None:
        """Let no call of this kind out for so long."""
        self._next_s[kind] = max(self._next_s.get(kind, 0.0), self._now_s() + seconds)


class ProviderHttp:
    """The way to one provider."""

    def __init__(self, name: str, base_url: str, headers: dict[str, str], settings: ProviderSettings) -> None:
        self.name = name
        self._base_url = base_url.rstrip("/")
        self._headers = headers
        self._secret = settings.api_key
        self._timeout_s = settings.timeout_s
        self._session: ClientSession | None = None

    async def call(
        self,
        phase: Phase,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: object = None,
    ) -> Answer:
        """Send one request and return the answer whatever its status. Raises ProviderUnavailable, InvalidAnswer."""
        return await self._send(phase, method, self._base_url + path, self._headers, query, body)

    async def fetch(self, phase: Phase, url: str) -> Answer:
        """Get a URL that the provider named, without the credential."""
        if not url.startswith(("https://", "http://")):
            raise InvalidAnswer(self.name, phase, f"it named {self.shown(url)!r}, which is no web address")
        return await self._send(phase, "GET", url, {}, None, None)

    async def close(self) -> None:
        """Close what is open."""
        if self._session is not None:
            await self._session.close()

    def shown(self, text: str) -> str:
        """Return a provider's words as they may stand in a message: short, printable, without our credential."""
        if self._secret:
            text = text.replace(self._secret, "***")
        flat = " ".join(text.split())
        return "".join(letter if letter.isprintable() else "?" for letter in flat[:SHOWN_MAX])

    async def _send(
        self,
        phase: Phase,
        method: str,
        url: str,
        headers: dict[str, str],
        query: dict[str, str] | None,
        body: object,
    ) -> Answer:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            )
        sent: dict[str, Any] = {"params": query, "headers": headers, "allow_redirects": False, "middlewares": (Once(),)}
        if body is not None:
            sent["data"] = msgspec.json.encode(body)
            sent["headers"] = {**headers, "Content-Type": "application/json"}
        is_changing = phase in CHANGING
        try:
            async with self._session.request(method, url, **sent) as response:
                return await self._read(phase, response)
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            message = f"no connection to {self._base_url} ({self.shown(str(error))}); check base_url and network"
            raise ProviderUnavailable(self.name, phase, message) from error
        except TimeoutError as error:
            message = f"no answer within {self._timeout_s:g} s; try later, or raise timeout_s"
            raise ProviderUnavailable(self.name, phase, message, may_have_worked=is_changing) from error
        except aiohttp.InvalidURL as error:
            raise InvalidAnswer(self.name, phase, "it named something that is no web address") from error
        except (aiohttp.ClientError, OSError) as error:
            message = f"the connection broke ({type(error).__name__}); try later"
            raise ProviderUnavailable(self.name, phase, message, may_have_worked=is_changing) from error

    async def _read(self, phase: Phase, response: "ClientResponse") -> Answer:
        parts, size = [], 0
        async for part in response.content.iter_chunked(1 << 16):
            parts.append(part)
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                message = f"its answer is over {ANSWER_BYTES_MAX} bytes"
                raise InvalidAnswer(self.name, phase, message, may_have_worked=phase in CHANGING)
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(phase, response.status, headers, b"".join(parts))

    def decode(self, answer: Answer, kind: type[Thing]) -> Thing:
        """Return the body as `kind`; what the type does not name is ignored. Raises InvalidAnswer."""
        try:
            return msgspec.json.decode(answer.body, type=kind, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
            message = f"its answer makes no sense ({self.shown(str(error))}); its API may have changed"
            is_changing = answer.phase in CHANGING
            raise InvalidAnswer(self.name, answer.phase, message, may_have_worked=is_changing) from error

    async def wait_turn(self, spacing: Spacing, kind: str, phase: Phase) -> None:
        """Wait until a call of this kind may go out. Raises RateLimited if that is longer than a call may take."""
        is_taken, wait_s = spacing.take(kind, self._timeout_s)
        if not is_taken:
            message = f"calls of this kind are spaced and the next may go out in {wait_s:.0f} s; come back then"
            raise RateLimited(self.name, phase, message, retry_after_s=wait_s)
        if wait_s:
            await asyncio.sleep(wait_s)
