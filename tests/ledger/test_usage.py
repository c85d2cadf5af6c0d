"""Sums over a customer's receipts."""

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from journals import DAY_NS, START_NS, frame, receipt

from gpuproxy.ledger.batch import priced
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.open_calls import Notes
from gpuproxy.ledger.usage import newest_calls, usage_summary
from gpuproxy.ledger.writer import open_writer
from gpuproxy.pricing import Catalogue, Price
from gpuproxy.store.engine import Store

NOTHING = {
    "requests": 0,
    "input_tokens": 0,
    "cached_tokens": 0,
    "output_tokens": 0,
    "request_bytes": 0,
    "response_bytes": 0,
    "cost_nanousd": 0,
}
ONE = {
    "requests": 1,
    "input_tokens": 10,
    "cached_tokens": 4,
    "output_tokens": 20,
    "request_bytes": 100,
    "response_bytes": 1_000,
    "cost_nanousd": 0,
}


@pytest.fixture
async def filled(store: Store, tmp_path: Path) -> Store:
    """Store four calls of u1 on two days and one of somebody else."""
    calls = [
        receipt(0),
        receipt(1, model="m2", key_id="k2", upstream="other"),
        receipt(2, input_tokens=-1, cached_tokens=-1, output_tokens=-1, usage_source="none"),
        receipt(3, started_ns=START_NS + DAY_NS),
        receipt(4, user_id="u2"),
    ]
    (tmp_path / "a.log").write_bytes(frame(calls))
    ingest = Ingest(store, tmp_path)
    await ingest.ingest_once()
    ingest.close()
    return store


async def test_a_user_without_calls_used_nothing(store: Store) -> None:
    assert await usage_summary(store, "nobody") == {**NOTHING, "by_model": []}


async def test_own_calls_are_summed_and_unknown_tokens_count_nothing(filled: Store) -> None:
    used = await usage_summary(filled, "u1")
    assert (used["requests"], used["input_tokens"], used["cached_tokens"]) == (4, 30, 12)
    assert (used["output_tokens"], used["request_bytes"], used["response_bytes"]) == (60, 400, 4_000)
    assert [(each["model"], each["requests"]) for each in used["by_model"]] == [("m1", 3), ("m2", 1)]


async def test_a_period_includes_its_start_and_excludes_its_end(filled: Store) -> None:
    first = datetime(2024, 10, 4, tzinfo=UTC)
    second = datetime(2024, 10, 5, tzinfo=UTC)
    assert (await usage_summary(filled, "u1", until=second))["requests"] == 3
    assert (await usage_summary(filled, "u1", since=second))["requests"] == 1
    assert (await usage_summary(filled, "u1", since=first, until=first))["requests"] == 0


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("day", [("2024-10-04", 3), ("2024-10-05", 1)]),
        ("model", [("m1", 3), ("m2", 1)]),
        ("key", [("k1", 3), ("k2", 1)]),
        ("upstream", [("llm", 3), ("other", 1)]),
    ],
)
async def test_calls_can_be_grouped(filled: Store, group_by: str, expected: list[tuple[str, int]]) -> None:
    used = await usage_summary(filled, "u1", group_by=group_by)  # type: ignore[arg-type]
    assert [(group[group_by], group["requests"]) for group in used["groups"]] == expected


async def test_tools_are_grouped_with_their_server_and_cost_and_other_calls_left_out(store: Store) -> None:
    calls = [
        receipt(1),
        receipt(2, upstream="web", rpc_method="tools/call", rpc_name="search", rpc_outcome="ok"),
        receipt(3, upstream="web", rpc_method="tools/call", rpc_name="search", rpc_outcome="tool_error"),
        receipt(4, upstream="docs", rpc_method="tools/call", rpc_name="search", rpc_outcome="ok"),
        receipt(5, upstream="docs", rpc_method="prompts/get", rpc_name="search", rpc_outcome="ok"),
    ]
    prices = Catalogue([Price("", upstream="web", tool="search", request_nanousd=7), Price("m1", request_nanousd=100)])
    writer = open_writer(store)
    await writer.write(priced(prices, [("lease:n/w", [msgspec.structs.astuple(call) for call in calls])], {}, Notes()))
    writer.close()
    used = await usage_summary(store, "u1", group_by="tool")
    assert [(group["tool"], group["requests"], group["cost_nanousd"]) for group in used["groups"]] == [
        ("docs/search", 1, 100), ("web/search", 2, 14),
    ]  # fmt: skip
    assert used["cost_nanousd"] == 314


async def test_a_group_has_all_sums(filled: Store) -> None:
    used = await usage_summary(filled, "u2", group_by="key")
    assert used["groups"] == [{"key": "k1", **ONE}]


async def test_the_newest_calls_come_first_and_are_ones_own(filled: Store) -> None:
    assert [call["id"] for call in await newest_calls(filled, "u1", limit=2)] == [receipt(3).id, receipt(2).id]
