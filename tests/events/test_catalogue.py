"""The catalogue of events: complete, consistent, and as README has it."""

import re
from pathlib import Path

import pytest

from gpuproxy.events import catalogue
from gpuproxy.events.catalogue import ALIASES, CHANNELS, EVENTS, socket_type, subscribable
from gpuproxy.events.outbox import DATA_BYTES_MAX, record
from gpuproxy.store.engine import Store

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_lists_every_event_as_the_table_has_it() -> None:
    written = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| `(\w+_(?:events|updates))` \| (.+) \|$", README, re.MULTILINE)
    assert written == [(name, kind.channel, kind.meaning) for name, kind in EVENTS.items()]


def test_every_channel_carries_something_and_every_event_has_a_channel() -> None:
    assert {kind.channel for kind in EVENTS.values()} == set(CHANNELS)
    assert set(ALIASES.values()) <= set(EVENTS)
    assert not set(ALIASES) & set(EVENTS)


def test_the_names_are_those_of_the_guide() -> None:
    known = subscribable(is_billing=False)
    for name in ("instance.created", "instance.destroyed", "payment.completed"):
        assert name in known
    for name in ("payment.success", "payment.failed", "subscription.renewed"):
        assert name in subscribable(is_billing=True)
    assert {socket_type("gpu.available"), socket_type("payment.completed")} == {"gpu_available", "payment_completed"}
    assert set(catalogue.spellings("payment.completed")) == {"payment.completed", "payment.success", "*"}


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_what_the_catalogue_does_not_hold_cannot_be_recorded(store: Store) -> None:
    for name, data in (("instance.borrowed", {}), ("instance.created", {"x": "y" * DATA_BYTES_MAX})):
        with pytest.raises(ValueError, match=name):
            await _record(store, name, data)


async def _record(store: Store, name: str, data: dict[str, str]) -> None:
    async with store.writing() as connection:
        await connection.run_sync(record, name, None, data)
