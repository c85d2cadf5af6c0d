"""Lists of a group whose servers tell theirs in pages."""

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec import Raw
from multidict import CIMultiDict

from gpuproxy.codec.mcp import decode_fields, object_of, text_of
from gpuproxy.codec.seal import Seal
from gpuproxy.config.mcp import McpGroup
from gpuproxy.control import mcp_group
from gpuproxy.control.mcp_answers import RpcError
from gpuproxy.control.mcp_group import PAGES_MAX, REMEMBERED_S, SILENT_S, Group, Turn
from gpuproxy.control.mcp_inner import ANSWER_BYTES_MAX, Inner, Seat, Told

LIST = {"jsonrpc": Raw(b'"2.0"'), "id": Raw(b"1"), "method": Raw(b'"tools/list"')}
SEATS = {"long": Seat(), "short": Seat()}


class Paging(Inner):
    """Two servers: one tells all at once, the other page by page, of which one may fail and each may be long."""

    def __init__(self, status: int = 200, page_bytes: int = 0) -> None:
        super().__init__("")
        self._status = status
        self._page_bytes = page_bytes
        self.asked: list[str] = []

    async def ask(self, request: web.Request, server: str, body: bytes | None, seat: Seat, timeout_s: float) -> Told:
        if server == "short":
            return told(server, {"tools": [{"name": "s"}]})
        cursor = text_of(object_of(decode_fields(body or b""), "params"), "cursor")
        self.asked.append(cursor)
        if cursor == "1" and self._status != 200:
            refusal = {"error": Raw(b'{"code":-32065,"data":{"code":"RATE_LIMITED"}}')} if self._status == 429 else {}
            return Told(server, self._status, CIMultiDict(), b"no", refusal)
        page = told(server, {"tools": [{"name": f"l{cursor}"}], "nextCursor": str(len(self.asked))})
        page.body = bytes(self._page_bytes)
        return page


def told(server: str, result: object) -> Told:
    return Told(server, 200, CIMultiDict(), response={"result": Raw(msgspec.json.encode(result))})


async def listed(inner: Inner) -> list[str]:
    group = Group(McpGroup("all", tuple(SEATS)), inner, Seal((bytes(32),)), 1 << 20)
    answer = await group._listed(Turn(make_mocked_request("POST", "/"), LIST, b"", SEATS), "tools/list")
    assert isinstance(answer, web.Response)
    assert isinstance(answer.body, bytes)
    return [tool["name"] for tool in msgspec.json.decode(answer.body)["result"]["tools"]]


async def test_pages_without_end_are_not_asked_for_without_end() -> None:
    inner = Paging()
    assert len(await listed(inner)) == PAGES_MAX + 1
    assert inner.asked == ["", *map(str, range(1, PAGES_MAX))]


async def test_the_pages_of_a_server_are_bounded_together() -> None:
    inner = Paging(page_bytes=ANSWER_BYTES_MAX // 4)
    await listed(inner)
    assert len(inner.asked) == 5


@pytest.mark.parametrize("status", [0, 500, 404])
async def test_a_server_whose_list_breaks_off_is_left_out_whole(status: int) -> None:
    assert await listed(Paging(status)) == ["short__s"]


async def test_a_caller_whose_limit_ends_within_a_list_is_told() -> None:
    with pytest.raises(RpcError) as refused:
        await listed(Paging(429))
    assert refused.value.answer(make_mocked_request("POST", "/")).status == 429


class Silent(Inner):
    """A server that takes no connection while it is down, and one that answers; `given_s` is what it was waited for."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__("")
        self._clock = clock
        self.given_s: list[float] = []
        self.is_down = True

    async def ask(self, request: web.Request, server: str, body: bytes | None, seat: Seat, timeout_s: float) -> Told:
        if server == "short":
            return told(server, {"tools": [{"name": "s"}]})
        self.given_s.append(timeout_s)
        if not self.is_down:
            return told(server, {"tools": []})
        self._clock[0] += min(5.0, timeout_s)
        return Told(server, 502 if timeout_s > 5 else 0, CIMultiDict())


async def test_a_server_that_lets_all_wait_is_not_waited_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(mcp_group, "monotonic", lambda: clock[0])
    inner = Silent(clock)
    group = Group(McpGroup("all", tuple(SEATS)), inner, Seal((bytes(32),)), 1 << 20)
    turn = Turn(make_mocked_request("POST", "/"), LIST, b"", SEATS)
    for _ in range(3):
        await group._listed(turn, "tools/list")
    assert inner.given_s == [10, SILENT_S, SILENT_S]
    inner.is_down = False
    for _ in range(2):
        await group._listed(turn, "tools/list")
    assert inner.given_s[3:] == [SILENT_S, 10], "it is believed again when it answers"


async def test_it_is_given_its_time_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(mcp_group, "monotonic", lambda: clock[0])
    inner = Silent(clock)
    group = Group(McpGroup("all", tuple(SEATS)), inner, Seal((bytes(32),)), 1 << 20)
    turn = Turn(make_mocked_request("POST", "/"), LIST, b"", SEATS)
    await group._listed(turn, "tools/list")
    clock[0] += REMEMBERED_S
    await group._listed(turn, "tools/list")
    assert inner.given_s == [10, 10]
